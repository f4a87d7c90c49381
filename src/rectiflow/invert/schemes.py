"""All inversion schemes, by name."""

from __future__ import annotations

from rectiflow.invert.ddim import DDIMInversion
from rectiflow.invert.dna import DirectNoiseAlignment
from rectiflow.invert.euler import EulerInversion
from rectiflow.invert.fireflow import FireFlowInversion
from rectiflow.invert.fixed_point import FixedPoint
from rectiflow.invert.interpolation import Interpolation
from rectiflow.invert.midpoint import MidpointInversion
from rectiflow.invert.query_offset import QueryOffset
from rectiflow.invert.renoising import Renoising
from rectiflow.invert.rf_inversion import RFInversion
from rectiflow.invert.scheme import Scheme
from rectiflow.invert.two_step import TwoStep
from rectiflow.invert.uni_inv import UniInv

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        EulerInversion(),
        DDIMInversion(),
        FixedPoint(),
        QueryOffset(),
        TwoStep(),
        MidpointInversion(),
        FireFlowInversion(),
        UniInv(),
        RFInversion(),
        DirectNoiseAlignment(),
        Interpolation(),
        Renoising(),
    )
}
