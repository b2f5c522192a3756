"""Random networks: every unlocked group cut at random is exact, and the original stays as it was.

The suite draws a few hundred; `python -m tests.test_property 10000` draws as many as asked.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import thinet
from tests.oracle import check, outputs, randomise
from tests.random_nets import ALL, PLAIN, RandomNet, Step
from thinet.errors import NothingLeftError

torch.set_num_threads(1)
NUMBERS = st.integers(0, 11)
QUIET = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),  # shrinking takes minutes; the note says what was drawn
    suppress_health_check=list(HealthCheck),
)


def steps_of(kinds: dict[str, Any], most: int) -> st.SearchStrategy[list[Step]]:
    kind = st.one_of(st.sampled_from(sorted(PLAIN)), st.sampled_from(sorted(kinds)))
    step = st.tuples(kind, NUMBERS, NUMBERS, NUMBERS)
    return st.lists(step, min_size=1, max_size=most)


def prepared(steps: list[Step], flatten: bool, seed: int) -> tuple[RandomNet, Any, Any]:
    torch.manual_seed(seed)
    model = randomise(RandomNet(steps, flatten), seed).double().eval()
    inputs = model.example().double()
    return model, inputs, thinet.find_groups(model, inputs)


def assert_exact_or_refused(steps: list[Step], flatten: bool, seed: int) -> int:
    """Cut all unlocked groups at once, then one of them alone. Returns how many can be cut."""
    model, inputs, groups = prepared(steps, flatten, seed)
    rng = random.Random(seed)
    if not all(bool(y.isfinite().all()) for y in outputs(model, inputs)):
        return 0  # nothing could be compared
    free = [g for g in groups if g.locked is None and g.channels > 1]
    removed = {g.name: rng.sample(range(g.channels), rng.randint(1, g.channels - 1)) for g in free}
    alone = [{name: removed[name]} for name in rng.sample(sorted(removed), min(1, len(removed)))]
    for some in [removed, *alone] if removed else []:
        with suppress(NothingLeftError):
            check(model, inputs, groups, some, thinet.cut)
    return len(free)


def assert_all_free(steps: list[Step], flatten: bool, seed: int) -> None:
    """In nets without hazards every layer but the head can lose channels."""
    model, _, groups = prepared(steps, flatten, seed)
    free = {
        (s.parameter, i)
        for g in groups
        if g.locked is None
        for s in g.slices(range(g.channels))
        if s.dim == 0
        for i in s.indices
    }
    reasons = {g.name: g.locked for g in groups if g.locked}
    for path, module in model.named_modules():
        if path != "head" and isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            missing = [i for i in range(len(module.weight)) if (f"{path}.weight", i) not in free]
            assert not missing, f"{path}: filters {missing} cannot be cut: {reasons}"


@QUIET
@given(steps_of(ALL, 7), st.booleans(), st.integers(0, 999))
def test_exact_or_refused(steps: list[Step], flatten: bool, seed: int) -> None:
    note(RandomNet(steps, flatten).describe())
    assert_exact_or_refused(steps, flatten, seed)


@settings(QUIET, max_examples=80)
@given(steps_of(PLAIN, 8), st.booleans(), st.integers(0, 999))
def test_nets_without_hazards_are_free(steps: list[Step], flatten: bool, seed: int) -> None:
    note(RandomNet(steps, flatten).describe())
    assert_all_free(steps, flatten, seed)


@settings(QUIET, max_examples=40)
@given(steps_of({"transposed": None, "grouped": None}, 7), st.integers(0, 999))
def test_a_full_repair_is_no_worse_than_the_bare_cut(steps: list[Step], seed: int) -> None:
    torch.manual_seed(seed)
    model = randomise(RandomNet(steps), seed).eval()
    note(model.describe())
    batches = list(torch.randn(64, 3, 4, 4).split(16))
    missed: dict[str, float] = {}
    with torch.no_grad():
        for repair in ("none", "full"):
            found = thinet.prune(
                model, batches[0][:2], batches, budget=thinet.Budget(keep=0.6), repair=repair
            )
            pairs = [(found.model(x), model(x)) for x in batches]
            missed[repair] = sum(float((a - b).square().sum()) for a, b in pairs)
            energy = sum(float(b.square().sum()) for _, b in pairs)
    assert missed["full"] <= 1.02 * missed["none"] + 1e-9 * energy


def draw(rng: random.Random, kinds: dict[str, Any], most: int) -> list[Step]:
    names = (sorted(PLAIN), sorted(kinds))
    count = rng.randint(1, most)
    return [
        (rng.choice(rng.choice(names)), *(rng.randrange(12) for _ in range(3)))
        for _ in range(count)
    ]


def main(count: int, first: int = 0) -> int:
    """Draw `count` networks by seed; print each failure with what redraws it."""
    failed, cuttable, kinds, start = 0, 0, {"wrong": 0, "locked without need": 0}, time.time()
    for seed in range(first, first + count):
        rng = random.Random(seed)
        plain = seed % 4 == 0
        steps, flatten = draw(rng, PLAIN if plain else ALL, 8), bool(seed % 2)
        for kind, test in (("wrong", assert_exact_or_refused), ("locked without need", None)):
            try:
                if test:
                    cuttable += test(steps, flatten, seed)
                elif plain:
                    assert_all_free(steps, flatten, seed)
            except Exception as error:  # noqa: BLE001
                failed, kinds[kind] = failed + 1, kinds[kind] + 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                sys.stdout.write(
                    f"{kind}: seed {seed}: {type(error).__name__}: {str(error)[:300]}\n"
                    f"  at {where.filename}:{where.lineno}\n"
                    f"{RandomNet(steps, flatten).describe()}\n"
                )
        if (seed + 1) % 500 == 0:
            sys.stdout.write(f"{seed + 1 - first} networks, {failed} failures\n")
            sys.stdout.flush()
    seconds = time.time() - start
    sys.stdout.write(
        f"{count} networks, {cuttable} groups cut, {failed} failures {kinds}, {seconds:.0f} s\n"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
