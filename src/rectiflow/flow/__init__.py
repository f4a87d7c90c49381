"""The mathematics of flows on tensors: paths, time grids, solvers, measures.

t = 0 is noise and t = 1 is data. Nothing here knows a model, a file or diffusers.
"""

from __future__ import annotations

from rectiflow.flow.diffusion import (
    StraightenedVelocity,
    VariancePreservingPath,
    variance_preserving,
)
from rectiflow.flow.grid import (
    GRIDS,
    check_grid,
    diffusers_default,
    dynamic,
    dynamic_mu,
    dynamic_shift,
    make_grid,
    part,
    shift_time,
    shifted,
    uniform,
)
from rectiflow.flow.measure import (
    COSTS,
    Estimate,
    NoiseStatistics,
    curvature,
    noise_statistics,
    straightness,
    transport_cost,
)
from rectiflow.flow.path import (
    PREDICTIONS,
    AffinePath,
    PathSample,
    StraightPath,
    convert,
    from_straight,
    to_straight,
)
from rectiflow.flow.solver import (
    SOLVERS,
    AdamsBashforth2,
    CountedVelocity,
    DormandPrince,
    Euler,
    FireFlow,
    Heun,
    Midpoint,
    RungeKutta4,
    Solution,
    Solver,
    Velocity,
    integrate,
    make_solver,
)

__all__ = [
    "COSTS",
    "GRIDS",
    "PREDICTIONS",
    "SOLVERS",
    "AdamsBashforth2",
    "AffinePath",
    "CountedVelocity",
    "DormandPrince",
    "Estimate",
    "Euler",
    "FireFlow",
    "Heun",
    "Midpoint",
    "NoiseStatistics",
    "PathSample",
    "RungeKutta4",
    "Solution",
    "Solver",
    "StraightPath",
    "StraightenedVelocity",
    "VariancePreservingPath",
    "Velocity",
    "check_grid",
    "convert",
    "curvature",
    "diffusers_default",
    "dynamic",
    "dynamic_mu",
    "dynamic_shift",
    "from_straight",
    "integrate",
    "make_grid",
    "make_solver",
    "noise_statistics",
    "part",
    "shift_time",
    "shifted",
    "straightness",
    "to_straight",
    "transport_cost",
    "uniform",
    "variance_preserving",
]
