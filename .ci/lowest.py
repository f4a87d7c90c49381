"""Print the lowest version that pyproject.toml allows of each dependency, as pip's constraints."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in chain(project["dependencies"], *project["optional-dependencies"].values()):
    if bound := re.match(r"([\w-]+)[>~]=([\d.]+)$", line):
        print(f"{bound[1]}=={bound[2]}")
