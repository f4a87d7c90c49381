"""The embedded world: scenes whose every edit has a known answer, and models trained on them."""
