"""Unbiased CKA of layers: known values, independence, sinks, and its standard errors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_distill.layers import Similarities, keep, normed


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unbiased_cka(x: Tensor, y: Tensor) -> float:
    """From the definition of unbiased HSIC with traces, Song et al. 2012, equation 5."""

    def hsic(k: np.ndarray, ell: np.ndarray) -> float:
        n = len(k)
        k, ell = k - np.diag(np.diag(k)), ell - np.diag(np.diag(ell))
        ones = np.ones(n)
        first = np.trace(k @ ell)
        second = (ones @ k @ ones) * (ones @ ell @ ones) / ((n - 1) * (n - 2))
        third = 2 / (n - 2) * (ones @ k @ ell @ ones)
        return float(first + second - third) / (n * (n - 3))

    a, b = x.double().numpy(), y.double().numpy()
    k, ell = a @ a.T, b @ b.T
    return float(hsic(k, ell) / np.sqrt(hsic(k, k) * hsic(ell, ell)))


class TestNormed:
    def test_products_are_unbiased_cka(self) -> None:
        x = draw(0, 20, 6)
        y = x[:, :3] @ draw(1, 3, 5) + draw(2, 20, 5) + 7
        value = float((normed(x.double()) * normed(y.double())).sum())
        assert value == pytest.approx(unbiased_cka(x, y), abs=1e-12)

    def test_scale_shift_and_rotation_change_nothing(self) -> None:
        x = draw(0, 30, 8).double()
        turned = 5 * x @ torch.linalg.qr(draw(1, 8, 8).double())[0] - 3
        assert float((normed(x) * normed(turned)).sum()) == pytest.approx(1, abs=1e-12)

    def test_constant_features_are_zero(self) -> None:
        assert normed(torch.full((5, 3), 0.1)).tolist() == [[0.0] * 5] * 5

    def test_low_precision_is_computed_in_fp32(self) -> None:
        assert normed(draw(0, 8, 4).bfloat16()).dtype == torch.float32

    @pytest.mark.parametrize("n", [0, 1, 3])
    def test_too_few_tokens_are_refused(self, n: int) -> None:
        with pytest.raises(
            ValueError, match=f"{n} tokens are too few for unbiased CKA; .* least 4"
        ):
            normed(torch.zeros(n, 2))


class TestKeep:
    def test_a_token_is_dropped_for_one_layer_of_one_model(self) -> None:
        states = [draw(0, 50, 16), draw(1, 50, 8), draw(2, 50, 4)]
        assert keep(states).all()
        states[1][7] *= 100
        assert (~keep(states)).nonzero().flatten().tolist() == [7]
        states[2][9, 0] = float("nan")
        states[0][11, 0] = float("inf")
        assert (~keep(states)).nonzero().flatten().tolist() == [7, 9, 11]

    def test_the_threshold_is_six_medians(self) -> None:
        layer = torch.tensor([[1.0], [-1.0], [1.0], [6.0], [-6.01]])
        assert keep([layer]).tolist() == [True, True, True, True, False]

    def test_no_layers_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no hidden states were given"):
            keep([])


class TestSimilarities:
    def test_one_value_is_the_ratio_of_sums(self) -> None:
        gathered = Similarities()
        sets = [(draw(k, n, 6), draw(9 + k, n, 5)) for k, n in enumerate((5, 9, 24, 60))]
        sets = [(x, torch.cat([x[:, :2], y], 1)) for x, y in sets]
        for x, y in sets:
            gathered.add([x, y])
        top = bottom_x = bottom_y = 0.0
        for x, y in sets:
            k, ell = normed(x.double()), normed(y.double())
            # Unbiased HSIC divides by n (n - 3): sets of all sizes count alike.
            pairs = len(x) * (len(x) - 3)
            scale = [float(u_gram(z).square().sum() / pairs) ** 0.5 for z in (x, y)]
            top += float((k * ell).sum()) * scale[0] * scale[1]
            bottom_x += scale[0] ** 2
            bottom_y += scale[1] ** 2
        found = gathered.result()["similarity"].values
        assert found.shape == (2, 2)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, found.mT)
        assert float(found[0, 1]) == pytest.approx(top / (bottom_x * bottom_y) ** 0.5, abs=1e-6)
        torch.testing.assert_close(found.diagonal(), torch.ones(2))

    def test_independent_features_are_zero_within_their_errors(self) -> None:
        """Width 256 at 64 tokens, where plain CKA reads 0.8; the errors are of the right size."""
        off = []
        for seed in range(6):
            gathered = Similarities()
            for k in range(8):
                base = 1000 * seed + 10 * k
                gathered.add([draw(base + i, 64, 256) for i in range(3)], [draw(base + 5, 64, 128)])
            found = gathered.result()
            similarity, cross = found["similarity"], found["cross"]
            assert cross.values.shape == (1, 3)
            above = torch.triu(torch.ones(3, 3), 1).bool()
            values = torch.cat([similarity.values[above], cross.values[0]])
            errors = torch.cat([similarity.errors[above], cross.errors[0]])
            assert float(values.abs().max()) < 0.03
            off.append(values / errors)
        standard = torch.cat(off)
        assert float((standard.abs() < 2.5).float().mean()) >= 0.9
        assert 0.7 < float(standard.square().mean().sqrt()) < 1.5
        assert float(plain_cka(draw(0, 64, 256), draw(1, 64, 256))) > 0.75

    def test_the_jackknife(self) -> None:
        """Standard error over the sets, each left out once, from fresh accumulators."""
        sets = [(draw(k, 16, 4), draw(k, 16, 4) + draw(50 + k, 16, 4)) for k in range(5)]

        def value(chosen: list[tuple[Tensor, Tensor]]) -> float:
            gathered = Similarities()
            for x, y in chosen:
                gathered.add([x, y])
            return float(gathered.result()["similarity"].values[0, 1])

        without = np.array([value(sets[:k] + sets[k + 1 :]) for k in range(5)])
        expected = np.sqrt(4 / 5 * ((without - without.mean()) ** 2).sum())
        gathered = Similarities()
        for x, y in sets:
            gathered.add([x, y])
        found = gathered.result()["similarity"].errors
        assert float(found[0, 1]) == pytest.approx(expected, rel=1e-4)
        assert float(found[0, 0]) == pytest.approx(0, abs=1e-7)

    def test_only_numbers_are_kept(self) -> None:
        """Whatever the width, and the number of tokens: what stays is [L, L] per set."""
        gathered = Similarities()
        for k in range(4):
            gathered.add([draw(k, 40, 1000), draw(k + 9, 40, 30)], [draw(k + 20, 40, 500)])
        held = [t for value in vars(gathered).values() if isinstance(value, list) for t in value]
        assert len(held) == 12
        assert max(t.numel() for t in held) == 4
        assert all(t.untyped_storage().nbytes() <= 32 for t in held)

    def test_sets_of_other_sizes_count_alike(self) -> None:
        gathered = Similarities()
        for k, n in enumerate((4, 8, 100, 33)):
            x = draw(k, n, 6)
            gathered.add([x, -x])
        values = gathered.result()["similarity"].values
        torch.testing.assert_close(values, torch.ones(2, 2))

    def test_a_constant_layer_is_like_no_other(self) -> None:
        gathered = Similarities()
        for k in range(4):
            gathered.add([torch.ones(10, 3), draw(k, 10, 3)])
        found = gathered.result()["similarity"]
        torch.testing.assert_close(found.values, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
        assert found.errors.isfinite().all()

    def test_no_gradients_are_kept(self) -> None:
        gathered = Similarities()
        for k in range(4):
            gathered.add([draw(k, 10, 3).requires_grad_()])
        assert not gathered.result()["similarity"].values.requires_grad

    def test_few_sets_say_nothing(self) -> None:
        gathered = Similarities()
        for k in range(3):
            assert gathered.result() == {}
            gathered.add([draw(k, 10, 3)])
        assert len(gathered) == 3
        assert gathered.result() == {}

    def test_sets_that_do_not_go_together_are_refused(self) -> None:
        gathered = Similarities()
        with pytest.raises(
            ValueError, match=r"a set has \[9, 10\] tokens; all layers need the same"
        ):
            gathered.add([torch.zeros(10, 3)], [torch.zeros(9, 3)])
        with pytest.raises(ValueError, match=r"a set has \[3\] tokens; .* at least 4"):
            gathered.add([torch.zeros(3, 3)])
        with pytest.raises(ValueError, match=r"a set has \[\] tokens"):
            gathered.add([])
        gathered.add([draw(0, 10, 3)], [draw(1, 10, 3)])
        with pytest.raises(
            ValueError, match="a set has 1 teacher and 0 student layers, those before it 1 and 1"
        ):
            gathered.add([draw(0, 10, 3)])


def u_gram(x: Tensor) -> Tensor:
    """U-centred Gram matrix from its definition, entry by entry."""
    x = x.double()
    gram = (x @ x.mT).fill_diagonal_(0)
    n = len(x)
    row = gram.sum(1) / (n - 2)
    return (gram - row[:, None] - row + gram.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)


def plain_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA with the bias."""
    x, y = x - x.mean(0), y - y.mean(0)
    top: Tensor = (x.mT @ y).square().sum()
    return top / ((x.mT @ x).square().sum() * (y.mT @ y).square().sum()).sqrt()
