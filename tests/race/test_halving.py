"""Who goes on in a race, and what that costs."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest

from llm_distill.layers import last, uniform
from llm_distill.race.halving import Arm, Result, Size, race, table

NONE = Arm("none", None)


def hints(count: int, weight: float = 3.0) -> list[Arm]:
    """Arms with a map of their own."""
    return [Arm(f"map {k}", uniform(2, 4), weight) for k in range(count)]


class Fake:
    """Trainings that come to what a function says."""

    def __init__(self, kl: Callable[[Arm, int], float]) -> None:
        self.kl = kl
        self.ran: list[tuple[Arm, int]] = []

    def __call__(self, arm: Arm, steps: int) -> float:
        self.ran.append((arm, steps))
        return self.kl(arm, steps)

    def rounds(self) -> list[list[Arm]]:
        """The arms of each round."""
        lengths = sorted({steps for _, steps in self.ran})
        return [[arm for arm, steps in self.ran if steps == length] for length in lengths]


class TestSize:
    def test_no_race_takes_more_than_its_budget(self) -> None:
        for count, weights, none in product(range(1, 8), range(1, 5), (False, True)):
            size = Size(count, weights, none=none)
            for budget in (size.least, size.least + 1, 3 * size.least + 7, 1000):
                if budget < size.least:
                    continue
                fake = Fake(lambda arm, steps: hash((arm.name, arm.weight, steps)) % 97)
                arms = hints(count) + [NONE] * none
                race(arms, [float(w) for w in range(1, weights + 1)], budget, fake)
                taken = sum(steps for _, steps in fake.ran)
                assert taken <= budget
                assert taken > budget / 2
                counted = Counter(steps for _, steps in fake.ran)
                assert tuple(counted[length] for length in sorted(counted)) == size.trainings

    def test_the_shortest_race_trains_long_enough(self) -> None:
        size = Size(6, 3)
        assert size.lengths(size.least)[0] == size.shortest == 15
        assert size.lengths(size.least - 1)[0] < size.shortest


class TestRace:
    def test_rounds(self) -> None:
        """All maps; the two best with every weight; the two best of those; none in every round."""
        order = {"map 1": 0.1, "map 3": 0.2, "map 0": 0.3, "map 2": 0.4, "none": 0.5}
        fake = Fake(lambda arm, _: order[arm.name] + abs(arm.weight - 1) / 100)
        winner, results = race([*hints(4), NONE], [1.0, 3.0, 10.0], 500, fake)
        first, second, third = fake.rounds()
        assert first == [NONE, *hints(4)]
        best = (hints(4)[1], hints(4)[3])
        weights = (1.0, 3.0, 10.0)
        assert second == [NONE, *(replace(arm, weight=w) for arm in best for w in weights)]
        assert third == [NONE, replace(best[0], weight=1.0), replace(best[0], weight=3.0)]
        assert winner == replace(best[0], weight=1.0)
        assert [(result.arm, result.steps) for result in results] == fake.ran
        assert all(result.kl == fake.kl(result.arm, result.steps) for result in results)

    def test_equal_figures_give_the_same_race(self) -> None:
        def figure(arm: Arm, steps: int) -> float:
            return len(arm.name) + arm.weight % 7 + steps % 3

        runs = [race([*hints(5), NONE], [1.0, 3.0], 300, Fake(figure)) for _ in range(2)]
        assert runs[0] == runs[1]

    def test_ties_go_to_the_first_and_to_no_hint(self) -> None:
        fake = Fake(lambda *_: 1.0)
        winner, _ = race([*hints(4), NONE], [1.0, 3.0], 300, fake)
        assert winner == NONE
        assert fake.rounds()[1][1:3] == [replace(hints(4)[0], weight=w) for w in (1.0, 3.0)]
        winner, _ = race(hints(4), [1.0, 3.0], 300, fake)
        assert winner == replace(hints(4)[0], weight=1.0)

    def test_no_hint_wins_unless_one_is_better(self) -> None:
        small = 1e-9
        better = Fake(lambda arm, _: 1.0 - small * (arm.mapping is not None))
        assert race([*hints(3), NONE], [1.0], 300, better)[0].mapping is not None
        worse = Fake(lambda arm, _: 1.0 + small * (arm.mapping is not None))
        assert race([*hints(3), NONE], [1.0], 300, worse)[0] == NONE

    @pytest.mark.parametrize("failed", [math.nan, math.inf])
    def test_trainings_that_failed_do_not_go_on(self, failed: float) -> None:
        fake = Fake(lambda arm, _: failed if arm.name != "map 2" else 1.0)
        winner, results = race([*hints(4), NONE], [1.0, 3.0], 300, fake)
        assert winner.name == "map 2"
        assert {arm.name for arm in fake.rounds()[2]} == {"map 2", "none"}
        assert not math.isfinite(results[0].kl)

    def test_no_hint_is_left_where_all_others_failed(self) -> None:
        fake = Fake(lambda arm, _: 1.0 if arm.mapping is None else math.nan)
        winner, results = race([*hints(2), NONE], [1.0], 300, fake)
        assert winner == NONE
        assert (
            "no hint is taken: KL 1.0000 without, all with one failed" in table(results, winner)[-1]
        )

    def test_a_race_without_a_survivor_is_no_race(self) -> None:
        with pytest.raises(FloatingPointError, match="came to a finite KL; try a smaller learning"):
            race([*hints(2), NONE], [1.0], 300, lambda *_: math.nan)

    def test_one_map_and_one_weight_still_meet_no_hint(self) -> None:
        fake = Fake(lambda arm, _: 1.0 if arm.mapping is None else 0.5)
        assert race([*hints(1), NONE], [2.0], 100, fake)[0] == replace(hints(1)[0], weight=2.0)


class TestTable:
    @staticmethod
    def results(*figures: float) -> Sequence[Result]:
        arm = Arm("last", last(2, 4), 3.0)
        return [Result(NONE, 20, figures[0]), Result(arm, 20, figures[1]), Result(arm, 10, 0.9)]

    def test_the_winner_is_marked_in_the_longest_round_alone(self) -> None:
        results = self.results(0.6, 0.5)
        told = table(results, results[1].arm)
        assert [line for line in told if "taken" in line] == [
            "         20 |      0.5000 | last x 3 <- taken"
        ]
        assert told[-1] == "race: the hint is worth 0.6000 - 0.5000 = 0.1000 of KL"

    def test_no_hint_is_told_with_figures(self) -> None:
        told = table(self.results(0.4, 0.5), NONE)
        assert told[-1] == "race: no hint is taken: KL 0.4000 without, KL 0.5000 with the best"
        assert told[1].endswith("none <- taken")

    def test_a_race_among_hints_alone_says_nothing_of_their_worth(self) -> None:
        results = self.results(0.6, 0.5)[1:]
        assert table(results, results[0].arm)[-1].endswith("| last x 3")
