"""All inversion schemes, by name."""

from __future__ import annotations

from rectiflow.invert.euler import EulerInversion
from rectiflow.invert.fixed_point import FixedPoint
from rectiflow.invert.query_offset import QueryOffset
from rectiflow.invert.renoising import Renoising
from rectiflow.invert.scheme import Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (EulerInversion(), FixedPoint(), QueryOffset(), Renoising())
}
