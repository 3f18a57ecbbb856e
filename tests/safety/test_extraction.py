"""Copies by brute force, chance by geometry, the number of examples held by simulation."""

import numpy as np
import pytest

from lowdim_diffusion import safety


def test_copies_are_those_of_brute_force():
    draw = np.random.default_rng(0)
    train = draw.normal(size=(40, 3, 2)).astype(np.float32)
    train[[7, 30, 31]] = train[3]
    train[20] = train[9]
    noise = lambda *shape: 0.05 * draw.normal(size=(*shape, 3, 2)).astype(np.float32)
    rows = [3, 30, 7, 9, 9, 1]
    new = draw.normal(size=(10, 3, 2)).astype(np.float32)
    samples = np.concatenate([train[rows] + noise(6), new])
    found = safety.extraction(samples, train)
    distinct = [i for i in range(40) if i not in (7, 30, 31, 20)]
    apart = np.linalg.norm((samples[:, None] - train[None, distinct]).reshape(16, 36, 6), axis=-1)
    ranked = np.sort(apart, axis=1)
    np.testing.assert_array_equal(found.is_copy, ranked[:, 0] < ranked[:, 1] / 3)
    np.testing.assert_array_equal(found.index, np.array(distinct)[apart.argmin(1)])
    np.testing.assert_allclose(found.distance, ranked[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.ratio, ranked[:, 0] / ranked[:, 1], rtol=1e-5)
    assert found.is_copy[:6].all()
    assert found.found[:3].tolist() == [3, 9, 1] and found.count[:3].tolist() == [3, 2, 1]
    assert found.closest[0] == np.argmin(found.ratio[:3]) and found.closest[2] == 5
    assert found.duplicates(30).tolist() == [3, 7, 30, 31] and found.num_distinct == 36
    assert found.count.sum() == found.is_copy.sum()
    # Without merging, duplicates hide their copies.
    first = np.linalg.norm((samples[:1, None] - train[None]).reshape(1, 40, 6), axis=-1)
    assert np.sort(first)[0, 0] == np.sort(first)[0, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_near_duplicates_are_merged_until_none_are_near(dtype):
    draw = np.random.default_rng(1)
    train = draw.integers(0, 256, (60, 5)).astype(dtype)
    train[10:20] = train[:10]
    train[20:30] = np.clip(train[:10].astype(int) + 1, 0, 255)
    train[30:40] = np.clip(train[:10].astype(int) + 2, 0, 255)  # a chain of steps of sqrt(5)
    equal, near = safety.duplicates(train), safety.duplicates(train, tolerance=3.0)
    np.testing.assert_array_equal(equal[10:20], np.arange(10))
    assert len(np.unique(equal)) == 50
    for group in (equal, near):
        assert (group <= np.arange(60)).all() and (group[group] == group).all()
    kept = train[np.unique(near)].astype(float)
    apart = np.linalg.norm(kept[:, None] - kept[None], axis=-1) + 1e9 * np.eye(len(kept))
    assert apart.min() > 3 and (near[20:30] == np.arange(10)).all()
    assert (safety.duplicates(np.array([[0.0], [-0.0]])) == 0).all()


def test_new_examples_pass_by_chance_as_often_as_geometry_says():
    """ratio^d of a Poisson process: the second nearest point is uniform outside the nearest."""
    draw = np.random.default_rng(2)
    samples, train = draw.random((5000, 2)), draw.random((3000, 2))
    found = safety.extraction(0.1 + 0.8 * samples.astype(np.float32), train.astype(np.float32))
    assert found.is_copy.mean() == pytest.approx(1 / 9, abs=0.015)


@pytest.mark.parametrize("held, copies", [(300, 300), (300, 900), (40, 400)])
def test_interval_covers_the_number_held(held, copies):
    """1000 simulated sets of copies, all examples alike."""
    draw = np.random.default_rng(3)
    estimates, covered, unseen = [], [], []
    for _ in range(1000):
        counts = np.bincount(draw.integers(0, held, copies))
        found = safety.extractable(counts[counts > 0])
        estimates.append(found.num_images)
        covered.append(found.low <= held <= found.high)
        unseen.append(found.unseen - (1 - np.sum(counts > 0) / held))
        assert found.low <= found.num_images <= found.high
    assert np.mean(estimates) == pytest.approx(held, rel=0.03)
    assert np.mean(covered) > 0.92
    assert abs(np.mean(unseen)) < 0.01


def test_unequal_probabilities_make_it_a_lower_bound():
    draw = np.random.default_rng(4)
    chances = draw.dirichlet(np.full(300, 0.5))
    found = [safety.extractable(c[c > 0]) for c in draw.multinomial(900, chances, size=200)]
    estimate = np.mean([f.num_images for f in found])
    assert 200 < estimate < 300
    limited = safety.extractable([1] * 50, 120)
    assert limited.num_images == limited.high == 120
    assert safety.extractable([]) == (0, 0, 0, 0)
    assert safety.extractable([9, 8]).low == 2


def test_chosen_score_is_judged_on_the_other_half():
    draw = np.random.default_rng(5)
    is_positive = np.arange(60) < 20
    scores = {str(i): draw.normal(size=60) for i in range(30)}
    chosen = safety.choose_score(scores, is_positive)
    first = np.concatenate([np.arange(20)[::2], np.arange(20, 60)[::2]])
    lucky = float(safety.auroc(chosen.sign * scores[chosen.name][first], is_positive[first]))
    assert lucky > 0.65 and chosen.auroc < lucky
    scores |= {"true": 0.3 * draw.normal(size=60) - is_positive}
    chosen = safety.choose_score(scores, is_positive)
    rest = np.concatenate([np.arange(20)[1::2], np.arange(20, 60)[1::2]])
    assert chosen.name == "true" and chosen.sign == -1
    expected = safety.auroc(-scores["true"][rest], is_positive[rest])
    assert chosen.auroc == pytest.approx(float(expected))


def test_errors(unchecked):
    x = np.eye(3)
    with pytest.raises(ValueError, match="at least 2 that differ"):
        safety.extraction(x, np.ones((5, 3)))
    with pytest.raises(ValueError, match=r"ratio.*\(0, 1\]"):
        safety.extraction(x, x, ratio=0)
    with pytest.raises(ValueError, match="the reference's"):
        safety.extraction(x[:, :2], x)
    with pytest.raises(ValueError, match="two or more of either kind"):
        safety.choose_score({"a": x[0]}, np.array([True, False, False]))
    with pytest.raises(ValueError, match="counts"):
        safety.extractable([0, 1])
