"""The search on simulated machines: it finds the optimum, believes no noise, and keeps its time."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from llama_crab.tuning.race import Noise, standing
from llama_crab.tuning.search import InfeasibleError, Lever, search

LEVERS = (
    Lever("n_threads", (1, 2, 3, 4, 6, 8)),
    Lever("n_batch", (256, 512, 1024, 2048)),
    Lever("n_ubatch", (64, 128, 256, 512, 1024)),
    Lever("flash_attn_type", ("auto", "disabled"), ordered=False),
    Lever("type_k", (None, "q8_0", "q4_0"), ordered=False),
)
START = {
    "n_threads": 4,
    "n_batch": 2048,
    "n_ubatch": 512,
    "flash_attn_type": "auto",
    "type_k": None,
}


class Machine:
    """A surface with known seconds, noise and a clock that only its work moves."""

    def __init__(self, seconds, *, noise=0.02, burst=0.0, setup=0.0, seed=0, infeasible=()):
        self.seconds = seconds
        self.noise = noise
        self.burst = burst
        self.setup = setup
        self.random = random.Random(seed)
        self.infeasible = infeasible
        self.now = 0.0
        self.ready = set()
        self.costs = []
        self.measured = []

    def clock(self):
        return self.now

    def setup_sec(self, point):
        return 0.0 if repr(sorted(point.items())) in self.ready else self.setup

    def prepare(self, point):
        for name, value in self.infeasible:
            if point[name] == value:
                raise InfeasibleError("out of memory")
        self._pass(self.setup_sec(point))
        self.ready.add(repr(sorted(point.items())))

    def measure(self, point):
        self.measured.append(dict(point))
        seconds = self.seconds(point) * math.exp(self.random.gauss(0.0, self.noise))
        if self.random.random() < self.burst:
            seconds *= self.random.uniform(1.2, 2.0)
        self._pass(seconds)
        return seconds

    def repair(self, point, lever):
        if point["n_batch"] >= point["n_ubatch"]:
            return point
        if lever == "n_batch":
            return {**point, "n_ubatch": point["n_batch"]}
        return {**point, "n_batch": point["n_ubatch"]}

    def _pass(self, seconds):
        self.now += seconds
        self.costs.append(seconds)


def run(machine, budget, levers=LEVERS, start=START, listener=None):
    return search(
        levers,
        start,
        machine,
        clock=machine.clock,
        deadline=machine.now + budget,
        listener=listener,
    )


def random_surface(rng, coupling):
    """Return seconds of a point: a factor per lever, and a term per pair of levers.

    Ordered levers have one optimum, anywhere, with a slope of its own on each side of it;
    `coupling` is the size of what two levers do together and neither does alone.
    """
    factors = {}
    for lever in LEVERS:
        n = len(lever.candidates)
        if lever.ordered:
            peak = rng.randrange(n)
            slopes = (rng.uniform(0.0, 0.3), rng.uniform(0.0, 0.3))
            logs = [slopes[i > peak] * abs(i - peak) for i in range(n)]
        else:
            logs = [rng.uniform(0.0, 0.3) for _ in range(n)]
        factors[lever.name] = dict(zip(lever.candidates, logs, strict=True))
    together = {}
    for one, other in itertools.combinations(LEVERS, 2):
        for a, b in itertools.product(one.candidates, other.candidates):
            together[one.name, a, other.name, b] = rng.uniform(-coupling, coupling)
    pairs = list(itertools.combinations([lever.name for lever in LEVERS], 2))

    def seconds(point):
        total = sum(factors[name][value] for name, value in point.items())
        total += sum(together[one, point[one], other, point[other]] for one, other in pairs)
        return 0.1 * math.exp(total)

    return seconds


def optimum(seconds):
    names = [lever.name for lever in LEVERS]
    points = (
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(lever.candidates for lever in LEVERS))
    )
    return min(seconds(point) for point in points if point["n_batch"] >= point["n_ubatch"])


def shares(coupling, n, **machine):
    found = []
    for seed in range(n):
        seconds = random_surface(random.Random(seed), coupling)
        result = run(Machine(seconds, seed=seed, **machine), budget=120.0)
        found.append(optimum(seconds) / seconds(result.best))
    return sorted(found)


def test_separable_surfaces_are_solved():
    """On 200 random machines: the speed found, as a share of the exhaustive optimum."""
    found = shares(0.0, 200)
    assert sum(share >= 0.97 for share in found) >= 190
    assert found[0] > 0.9


def test_mildly_coupled_surfaces_are_solved():
    found = shares(0.01, 200)
    assert sum(share >= 0.97 for share in found) >= 190
    assert found[0] > 0.88


def test_bursts_of_other_work_do_not_mislead():
    """One measurement in ten takes up to twice as long."""
    found = shares(0.0, 100, burst=0.1)
    assert sum(share >= 0.97 for share in found) >= 85


def test_the_incumbent_stays_where_nothing_differs():
    n_moved = 0
    for seed in range(200):
        result = run(Machine(lambda _: 0.1, noise=0.05, seed=seed), budget=1000.0)
        n_moved += result.best != START
        assert result.ended == "converged"
    assert n_moved <= 4


def test_a_gain_that_the_final_check_does_not_find_is_dropped():
    """The races see a fast setting, which has slowed down when it is measured at the end."""

    class Throttled(Machine):
        def measure(self, point):
            tired = len(self.measured) > 30
            self.seconds = lambda p: 0.1 if tired or p["n_threads"] == 4 else 0.05
            return super().measure(point)

    machine = Throttled(lambda _: 0.1, noise=0.001)
    result = run(machine, budget=1000.0)
    assert any(step.kept for step in result.steps)
    assert result.confirmed
    assert result.best == START
    assert result.found != START


@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0, 3.0, 10.0, 30.0])
@pytest.mark.parametrize("setup", [0.0, 0.5])
def test_the_budget_is_passed_by_one_measurement_at_most(budget, setup):
    for seed in range(40):
        seconds = random_surface(random.Random(seed), 0.02)
        machine = Machine(seconds, seed=seed, burst=0.05, setup=setup)
        run(machine, budget)
        if machine.now > budget:
            assert machine.now - machine.costs[-1] <= budget or len(machine.measured) == 1


def test_what_is_measured_respects_the_interaction_of_levers():
    """A larger n_ubatch brings its n_batch along, a smaller n_batch its n_ubatch."""
    machine = Machine(lambda point: 100.0 / point["n_ubatch"], noise=0.001)
    start = {**START, "n_batch": 512}
    result = run(machine, budget=1e6, start=start)
    assert all(point["n_batch"] >= point["n_ubatch"] for point in machine.measured)
    assert result.best["n_ubatch"] == 1024
    assert result.best["n_batch"] == 1024
    step = next(step for step in result.steps if step.after == 1024 and step.kept)
    assert (step.lever, step.before, step.note) == ("n_ubatch", 512, "with n_batch 1024")


def test_a_lever_that_moved_another_optimum_is_tried_again():
    """Two threads are best without flash attention, eight with it: the second pass finds it."""

    def seconds(point):
        best = 2 if point["flash_attn_type"] == "disabled" else 8
        far = abs(math.log2(point["n_threads"] / best))
        return (0.05 if point["flash_attn_type"] == "disabled" else 0.1) * (1 + 0.2 * far)

    result = run(Machine(seconds, noise=0.005), budget=1000.0)
    assert result.best["flash_attn_type"] == "disabled"
    assert result.best["n_threads"] == 2


def test_a_setting_that_does_not_fit_is_passed_over():
    machine = Machine(
        lambda point: 1.0 / point["n_ubatch"], noise=0.001, infeasible=[("n_ubatch", 1024)]
    )
    result = run(machine, budget=1000.0)
    assert result.best == START
    step = next(step for step in result.steps if (step.lever, step.after) == ("n_ubatch", 1024))
    assert (step.verdict, step.note) == ("infeasible", "out of memory")


def test_what_is_too_dear_is_left_out_and_the_rest_goes_on():
    """A lever whose values need long preparation does not end the search for the cheap ones."""

    class Dear(Machine):
        def setup_sec(self, point):
            return 0.0 if point["flash_attn_type"] == "auto" else 1000.0

    machine = Dear(lambda point: 1.0 / point["n_threads"], noise=0.001)
    levers = (LEVERS[3], LEVERS[0])
    result = run(machine, budget=100.0, levers=levers)
    assert result.ended == "budget"
    assert result.best["n_threads"] == 8
    assert all(point["flash_attn_type"] == "auto" for point in machine.measured)


def test_a_start_that_does_not_fit_is_an_error():
    machine = Machine(lambda _: 0.1, infeasible=[("n_threads", 4)])
    with pytest.raises(InfeasibleError):
        run(machine, budget=10.0)


def test_ctrl_c_keeps_what_was_measured_as_better():
    class Interrupted(Machine):
        def measure(self, point):
            if len(self.measured) == 40:
                raise KeyboardInterrupt
            return super().measure(point)

    machine = Interrupted(lambda point: 1.0 / point["n_threads"], noise=0.001)
    result = run(machine, budget=1000.0)
    assert result.ended == "interrupted"
    assert result.best == {**START, "n_threads": 8}
    assert not result.confirmed


def test_the_final_check_takes_turns():
    machine = Machine(lambda point: 1.0 / point["n_threads"], noise=0.001)
    result = run(machine, budget=1000.0)
    n = len(result.before)
    assert n == len(result.after) >= 3
    last = [point["n_threads"] for point in machine.measured[-2 * n :]]
    assert last[:4] == [4, 8, 8, 4]
    assert result.gain == pytest.approx(1.0, abs=0.02)


def test_steps_are_told_as_they_come():
    told = []
    result = run(Machine(random_surface(random.Random(1), 0.0)), 100.0, listener=told.append)
    assert told == result.steps
    assert len(told) > 5


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((0.5,), "open"),
        ((-0.2,), "open"),
        ((-0.8,), "slower"),
        ((0.5, 0.5), "faster"),
        ((0.5, -0.01), "open"),
        ((-0.5, 0.01), "open"),
        ((-0.5, -0.4), "slower"),
        ((0.5, 0.5, -0.6), "faster"),
        ((-0.03, -0.02, -0.03), "same"),
        ((0.03, 0.03, 0.03), "open"),
    ],
)
def test_what_rounds_decide(ratios, verdict):
    assert standing(ratios, Noise()).verdict == verdict


def test_the_last_round_leaves_nothing_open():
    assert standing((0.03, 0.03, 0.03), Noise(), last=True).verdict == "same"


def test_noise_is_learnt_and_bursts_do_not_count():
    noise = Noise()
    rng = random.Random(0)
    for _ in range(200):
        one, other = rng.gauss(0.0, 0.1), rng.gauss(0.0, 0.1)
        noise.add(one, other + (2.0 if rng.random() < 0.05 else 0.0))
    assert noise.sigma == pytest.approx(0.1, rel=0.2)
