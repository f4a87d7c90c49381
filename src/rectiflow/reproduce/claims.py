"""InstaFlow's claims, and what the figures say of each: it holds, it does not, or cannot be told.

The letters are those of this project's list; published figures are COCO-2017 FIDs of Liu et al.
2023, arXiv 2309.06380. A comparison "holds" where the 95 % interval of the difference lies on its
side of 0; differences are taken in pairs of equal captions and noise, and over training seeds
where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rectiflow.reproduce.figures import Cell, Estimate, Figures
from rectiflow.reproduce.instaflow import ALPHAS, K_STEPS, SEEDS, SHARES, TRAILING

HOLDS, FAILS, EVEN, MISSING = "holds", "does not hold", "not told apart", "not run"
PART = "in part"
SHIPPED = ["emoji-instaflow-at-1"], ["emoji-direct-at-1"]
"""The row of the one-step model that ships, and of direct distillation of as many samples."""
SLIGHTLY = 1.5
"""Of a Fréchet distance: up to so many times the teacher's counts as a slight drop in quality."""


@dataclass(frozen=True)
class Verdict:
    """What is said of a claim.

    Args:
        key: Its letter; with a prime where it is asked of another figure than the paper's.
        claim: In words.
        published: The paper's figures.
        verdict: One of the five words above.
        sentence: The figures it rests on.
    """

    key: str
    claim: str
    published: str
    verdict: str
    sentence: str


def all_claims(figures: Figures) -> list[Verdict]:
    """The verdict on each claim."""
    return [
        Verdict(key, claim, published, *decide(figures)) for key, claim, published, decide in CLAIMS
    ]


def seeded(kind: str) -> list[str]:
    """The rows of a kind of one-step student, over the training seeds."""
    return [f"{kind}-{seed}-at-1" for seed in SEEDS]


def shown(value: Estimate, digits: int = 2) -> str:
    """A figure with half its interval, or with the interval's ends."""
    if value.ends is not None:
        return f"{value.mean:.{digits}f} ({value.low:.{digits}f}–{value.high:.{digits}f})"
    return f"{value.mean:.{digits}f} ± {value.half:.{digits}f}"


Decision = tuple[str, str]


def _less(
    figures: Figures,
    cells: Sequence[Cell],
    others: Sequence[Cell],
    words: str,
    digits: int = 2,
    factor: float = 1,
) -> Decision:
    """Whether some cells are less than others; `words` has a place for each side's mean."""
    a, b = figures.mean(cells), figures.mean(dict.fromkeys(others))  # one may stand for all
    gap = figures.difference(cells, others)
    if a is None or b is None or gap is None:
        return MISSING, "–"
    a, b, gap = (x.scaled(factor) for x in (a, b, gap))
    sentence = words.format(shown(a, digits), shown(b, digits))
    sentence += f", difference {gap.mean:+.{digits}f} ± {gap.half:.{digits}f}"
    sentence += f" ({gap.n} seeds)" if gap.n > 1 else " (one run)"
    return HOLDS if gap.high < 0 else FAILS if gap.low > 0 else EVEN, sentence


def _cells(names: Iterable[str], figure: str = "frechet") -> list[Cell]:
    return [(name, figure) for name in names]


def _together(*decisions: Decision) -> Decision:
    """One verdict on several comparisons; the sentence says how many of them were not run."""
    ran = [one for one in decisions if one[0] != MISSING]
    if not ran:
        return MISSING, "–"
    verdicts = {verdict for verdict, _ in ran}
    verdict = verdicts.pop() if len(verdicts) == 1 else PART
    sentences = [f"{sentence}: {word}" for word, sentence in ran]
    if missing := len(decisions) - len(ran):
        sentences.append(f"{missing} of {len(decisions)} comparisons not run")
    return verdict, "; ".join(sentences)


def _reflow_first(figures: Figures) -> Decision:
    def compared(label: str, ours: list[str], direct: list[str], figure: str) -> Decision:
        words = f"{label}, {{}} after reflow, {{}} directly"
        return _less(figures, _cells(ours, figure), _cells(direct, figure), words)

    found = _together(
        compared("the paper's recipe", seeded("paper-one"), seeded("paper-direct"), "frechet"),
        *(
            compared(f"with one in {share} of the samples", *_share(share), "frechet")
            for share in SHARES
        ),
        *(
            compared(
                f"with one in {share}, in batches of 8, by pseudo-Huber and Muon",
                *_share(share, "tuned"),
                "frechet",
            )
            for share in SHARES
        ),
        compared(
            "both distilled on 8192 pairs",
            seeded("many-pairs-one"),
            seeded("paper-direct"),
            "frechet",
        ),
        compared(
            "both distilled on 1024 pairs",
            ["few-pairs-one-0-at-1"],
            ["few-pairs-direct-0-at-1"],
            "frechet",
        ),
        *(
            compared(
                f"directly on 1024 pairs, one in {share} of the samples",
                [f"paper-one-of-1-in-{share}-at-1"],
                [f"few-pairs-direct-of-1-in-{share}-at-1"],
                "frechet",
            )
            for share in SHARES
        ),
        compared("exact start", ["one-0-at-1"], ["direct-0-at-1"], "frechet"),
        compared("as shipped, of all 5000 pictures", *SHIPPED, "frechet_of_all"),
    )
    return _prefixed("Fréchet distance by", found)


def _recognised(figures: Figures) -> Decision:
    def compared(label: str, ours: list[str], direct: list[str]) -> Decision:
        words = f"{label}, {{}} % after reflow, {{}} % directly"
        mine, theirs = _cells(ours, "emoji"), _cells(direct, "emoji")
        verdict, sentence = _less(figures, mine, theirs, words, digits=1, factor=100)
        return {HOLDS: FAILS, FAILS: HOLDS}.get(verdict, verdict), sentence  # more is better

    found = _together(
        compared("the paper's recipe", seeded("paper-one"), seeded("paper-direct")),
        compared("both distilled on 8192 pairs", seeded("many-pairs-one"), seeded("paper-direct")),
        *(compared(f"with one in {share} of the samples", *_share(share)) for share in SHARES),
        compared("as shipped", *SHIPPED),
    )
    return _prefixed("emoji recognised by", found)


def _share(share: int, kind: str = "paper") -> tuple[list[str], list[str]]:
    return [f"{kind}-one-of-1-in-{share}-at-1"], [f"{kind}-direct-of-1-in-{share}-at-1"]


def _prefixed(words: str, found: Decision) -> Decision:
    return found if found[0] == MISSING else (found[0], f"{words}: {found[1]}")


def _straighter(figures: Figures) -> Decision:
    """Beside the field that the pairs were made by: the teacher's under guidance, as in the paper.

    Without it the teacher's own field is nearly straight, and what it draws is poor.
    """

    def compared(label: str, flows: list[str], figure: str, name: str) -> Decision:
        words = f"{name} {{}} of {label}, {{}} of the teacher under guidance"
        theirs = _cells(["flow-teacher"] * len(flows), figure)
        return _less(figures, _cells(flows, figure), theirs, words, digits=3)

    measures = ("straightness", "S(Z)"), ("transport_cost", "E‖x_1 − x_0‖²/d")
    flows = {
        "the paper's recipe": [f"flow-paper-2rf-{seed}" for seed in SEEDS],
        "the one that ships": ["flow-emoji-2rf"],
    }
    found = _together(
        *(compared(label, names, *one) for one in measures for label, names in flows.items())
    )
    unguided = figures.of("flow-teacher-alpha-1", "straightness")
    if found[0] == MISSING or unguided is None:
        return found
    return found[0], f"{found[1]}; S(Z) of the teacher without guidance {shown(unguided, 3)}"


def _resembles(figures: Figures) -> Decision:
    def compared(label: str, ours: list[Cell], direct: list[str]) -> Decision:
        words = f"{label}, mean squared distance to its own teacher's picture {{}}·10⁻³ after "
        words += "reflow, {}·10⁻³ directly"
        others = _cells(direct, "likeness:teacher-at-25")
        return _less(figures, ours, others, words, factor=1e3)

    paper = [(f"paper-one-{seed}-at-1", f"likeness:paper-2rf-{seed}-at-8") for seed in SEEDS]
    exact = [("one-0-at-1", "likeness:2rf-0-at-8")]
    shipped = [("emoji-instaflow-at-1", "likeness:emoji-2rf-at-25")]
    return _together(
        compared("the paper's recipe", paper, seeded("paper-direct")),
        compared("exact start", exact, ["direct-0-at-1"]),
        compared("as shipped", shipped, ["emoji-direct-at-1"]),
    )


def _few_steps(figures: Figures) -> Decision:
    def compared(mine: int, theirs: int, solver: str = "") -> Decision:
        name = f"teacher-{solver}-trailing" if solver else "teacher"
        return _less(
            figures,
            _cells([f"emoji-2rf-at-{mine}"]),
            _cells([f"{name}-at-{theirs}"]),
            f"{{}} at {mine}, {{}} of the teacher at {theirs}"
            + (f" by {solver} on trailing timesteps" if solver else ""),
        )

    equal = [compared(k, k) for k in K_STEPS]
    found = _together(*equal, compared(2, 4), *(compared(2, 4, solver) for solver in TRAILING))
    return _prefixed("Fréchet distance by steps", found)


def _guidance(figures: Figures) -> Decision:
    """Whether one α in [1, 2] is best, and each greater one worse; in part if that is 1 alone."""
    rows = {alpha: f"alpha-{alpha}-at-8" for alpha in ALPHAS}
    found = {alpha: figures.of(row, "frechet") for alpha, row in rows.items()}
    known = {alpha: one for alpha, one in found.items() if one is not None}
    if len(known) < len(ALPHAS):
        return MISSING, "–"
    best = min(known, key=lambda alpha: known[alpha].mean)

    def gap(alpha: float) -> Estimate:
        """To the best; of its own row there is none."""
        if alpha == best:
            return Estimate(0, 0)
        one = figures.difference(_cells([rows[alpha]]), _cells([rows[best]]))
        assert one is not None
        return one

    gaps = {alpha: gap(alpha) for alpha in ALPHAS}
    served = [alpha for alpha in ALPHAS if alpha <= 2 and gaps[alpha].low <= 0]
    worse = [alpha for alpha in ALPHAS if alpha > 2 and gaps[alpha].low > 0]
    if not served:
        verdict = FAILS
    elif best > 2 or len(worse) < sum(alpha > 2 for alpha in ALPHAS):
        verdict = EVEN
    else:
        verdict = HOLDS if any(alpha > 1 for alpha in served) else PART
    listed = ", ".join(
        f"{value.mean:.2f} at {alpha}"
        + (f" ({gaps[alpha].mean:+.2f} ± {gaps[alpha].half:.2f})" if alpha != best else "")
        for alpha, value in known.items()
    )
    return verdict, f"Fréchet distance in 8 steps by α: {listed}; least at {best}"


def _stacking(figures: Figures) -> Decision:
    def compared(label: str, stacked: str, single: str) -> Decision:
        words = f"{label}, {{}} stacked, {{}} single"
        return _less(figures, _cells([stacked]), _cells([single]), words)

    after = compared("after reflow", "stacked-at-1", "paper-one-0-at-1")
    before = compared("before", "stacked-direct-at-1", "single-direct-at-1")
    if MISSING in (after[0], before[0]):
        return MISSING, "–"
    if before[0] == HOLDS:  # it is to pay after reflow only
        verdict = PART if after[0] == HOLDS else FAILS
    else:
        verdict = after[0]
    return verdict, f"Fréchet distance {after[1]}; {before[1]}"


def _many_steps(figures: Figures) -> Decision:
    def row(name: str) -> list[Cell]:
        return [(f"{name}-at-25", "frechet_of_all")]

    words = "Fréchet distance of all 5000 pictures {} at 25 steps, {} of the teacher"
    verdict, sentence = _less(figures, row("emoji-2rf"), row("teacher"), words)
    ours, teacher = (figures.mean(row(name)) for name in ("emoji-2rf", "teacher"))
    if ours is None or teacher is None or verdict == EVEN:
        return verdict, sentence
    if verdict == HOLDS:
        return FAILS, f"{sentence}: no drop, but a gain"
    ratio = ours.mean / teacher.mean
    return (HOLDS if ratio <= SLIGHTLY else FAILS), f"{sentence}, {ratio:.2f} times as much"


CLAIMS: tuple[tuple[str, str, str, Callable[[Figures], Decision]], ...] = (
    (
        "a",
        "Direct distillation is clearly worse than reflow and distillation at equal training",
        "40.9 against 31.0",
        _reflow_first,
    ),
    (
        "a′",
        "… and by the emoji that the sprite judge recognises (not the paper's)",
        "–",
        _recognised,
    ),
    ("b", "Reflow lowers S(Z) and the transport cost", "a plot", _straighter),
    (
        "c",
        "After reflow the distilled student resembles its teacher's picture more",
        "pictures",
        _resembles,
    ),
    (
        "d",
        "In few steps the 2-rectified flow beats the teacher with DPM-Solver++",
        "47.0, 31.3 in 1 and 2 steps; SD 1.5 31.7 in 8",
        _few_steps,
    ),
    (
        "e",
        "α in [1, 2] serves the 2-rectified flow; more of it makes pictures worse",
        "α = 1.5 chosen",
        _guidance,
    ),
    ("f", "A stacked U-Net pays after reflow, not before", "24.6; 52.0 without reflow", _stacking),
    (
        "g",
        "Many-step quality drops slightly by reflow",
        "21.5 against 20.1 at 25 steps",
        _many_steps,
    ),
)
