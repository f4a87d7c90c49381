"""Training: one loop for codecs, flows and, later, reflow and distillation."""
