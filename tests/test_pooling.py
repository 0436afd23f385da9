# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from peft_sage import pool_guidance


def grouped(num_groups: int = 6, size: int = 20, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows around orthogonal directions, in random order, and those directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(num_groups, 16)
    rows = directions.repeat(size, 1) + spread * torch.randn(num_groups * size, 16, generator=generator)
    return F.normalize(rows[torch.randperm(len(rows), generator=generator)], dim=1), directions


def test_few_rows_stay_as_they_are():
    rows, _ = grouped()
    torch.testing.assert_close(pool_guidance(3 * rows, len(rows)), rows)


def test_the_result_is_unit_rows_of_float32_whatever_comes_in():
    rows, _ = grouped()
    pooled = pool_guidance(rows.double(), 7)
    assert pooled.shape == (7, 16) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(7))


def test_every_row_is_nearer_to_its_mean_than_to_the_start_and_the_means_are_those_of_their_rows():
    rows, _ = grouped(spread=0.4)
    start, pooled = pool_guidance(rows, 9, iterations=1), pool_guidance(rows, 9, iterations=100)
    assert (rows @ pooled.T).amax(1).mean() > (rows @ start.T).amax(1).mean()
    nearest = (rows @ pooled.T).argmax(1)
    for group in nearest.unique():  # a fixed point of k-means
        torch.testing.assert_close(pooled[group], F.normalize(rows[nearest == group].sum(0), dim=0))


def test_clear_groups_are_found():
    rows, directions = grouped()
    # More means than groups, so that no start can miss one.
    found = (directions @ pool_guidance(rows, 40).T).amax(1)
    assert (found > 0.99).all()


def test_the_same_rows_give_the_same_result_and_another_seed_another():
    rows, _ = grouped(spread=0.5)
    assert torch.equal(pool_guidance(rows, 5), pool_guidance(rows, 5))
    assert not torch.equal(pool_guidance(rows, 5), pool_guidance(rows, 5, seed=1))


def test_equal_rows_leave_no_nan():
    assert torch.isfinite(pool_guidance(torch.ones(50, 4), 8)).all()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"guidance": [[1.0, 0.0]]}, TypeError, "`guidance`.*list"),
        ({"guidance": torch.full((4, 2), torch.nan)}, ValueError, "`guidance`.*NaN"),
        ({"guidance": torch.ones(4, 2), "num_rows": 0}, ValueError, "`num_rows`.*0"),
        ({"guidance": torch.ones(4, 2), "num_rows": 2.5}, ValueError, "`num_rows`.*2.5"),
        ({"guidance": torch.ones(4, 2), "num_rows": True}, ValueError, "`num_rows`.*True"),
        ({"guidance": torch.ones(4, 2), "iterations": -1}, ValueError, "`iterations`.*-1"),
        ({"guidance": torch.ones(4, 2), "seed": 0.5}, ValueError, "`seed`.*0.5"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        pool_guidance(**arguments)
