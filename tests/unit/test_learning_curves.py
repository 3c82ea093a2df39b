"""What a training logged as plots: every value where its axes say."""

import numpy
import pytest


@pytest.fixture(scope="module")
def curves(pack):
    return pack.training.learning_curves


def records(count: int) -> list[dict]:
    """A line upwards, something that is looked at every 50 steps, and no step skipped."""
    made = [{"time": 0.0, "step": i, "loss": float(i), "skipped": 0.0} for i in range(1, count + 1)]
    for record in made[::50]:
        record["signal"] = 1 / record["step"]
    return made


def coloured(picture, colour) -> list[tuple[int, int]]:
    """(x, y) of all pixels of a colour."""
    rows, columns = numpy.nonzero((numpy.asarray(picture) == colour).all(-1))
    return list(zip(columns.tolist(), rows.tolist(), strict=True))


@pytest.mark.parametrize("window", [1, 3, 20, 1000])
def test_the_line_is_the_mean_of_the_last_steps(curves, window):
    values = numpy.random.default_rng(0).normal(size=60).tolist()
    slow = [numpy.mean(values[max(0, i - window + 1) : i + 1]) for i in range(60)]
    assert curves.trailing_mean(values, window) == pytest.approx(slow, abs=1e-12)


def test_only_what_was_logged_is_there_and_what_steps_lack_is_left_out(curves):
    found = curves.logged([{"step": 1, "loss": 2.0, "skipped": 0.0}, {"step": 2, "skipped": 1.0, "gradient": 3.0}])
    assert found == {"loss": ([1], [2.0]), "skipped": ([1, 2], [0.0, 1.0])}
    assert list(curves.logged(records(60))) == ["loss", "signal"], "a plot of no skipped step"
    assert curves.logged([]) == {}


def test_a_length_is_named_by_what_is_trained(curves):
    settings = ({"vectors": 2}, {"rank": 8}, {"rank": 8, "tokens": 4}, {"pairs": 60})
    names = [{**curves.TITLES, **curves.own_titles(each)}["norm"][0] for each in settings]
    assert names == [
        "Length of the word",
        "Size of the LoRA's changes",
        "Length of the tokens",
        "Length of the embeddings",
    ]


def test_a_step_lies_where_the_ends_of_the_axes_say(curves):
    series = curves.Series([1, 51, 101], [0.0, 4.0, 2.0])
    assert series.sparse
    dots = coloured(curves.plot(series, series.values, ("", ""), (1, 101)), curves.INK)
    middle = (curves.LEFT + curves.WIDTH - curves.RIGHT) / 2
    top = min(y for x, y in dots if abs(x - middle) <= 2)
    room = (curves.HEIGHT - curves.TOP - curves.BOTTOM) * 0.06 / 1.12
    assert top == pytest.approx(curves.TOP + room - 2, abs=1.5)
    last = [y for x, y in dots if x > middle + 100 and y < curves.HEIGHT - curves.BOTTOM]
    assert numpy.mean(last) == pytest.approx((curves.TOP + curves.HEIGHT - curves.BOTTOM) / 2, abs=1.5)


def test_the_line_of_a_rise_lags_and_that_of_a_length_does_not(curves):
    for name, lag in (("loss", 9.5), ("norm", 0.0)):
        series = {name: curves.Series(list(range(1, 201)), [float(i) for i in range(200)])}
        drawn = curves.learning_curves(series, 20)
        ys = [y for x, y in coloured(drawn, curves.LINE) if x == curves.WIDTH // 2 + 20]
        slope = (curves.HEIGHT - curves.TOP - curves.BOTTOM) / 1.12 / 199  # pixels for each value
        x_share = (curves.WIDTH // 2 + 20 - curves.LEFT) / (curves.WIDTH - curves.LEFT - curves.RIGHT)
        value = (x_share * 1.12 - 0.06) * 199 - lag
        there = curves.HEIGHT - curves.BOTTOM - (value + 0.06 * 199) * slope
        assert numpy.mean(ys) == pytest.approx(there, abs=1.5), name


def test_what_was_logged_once_is_a_dot(curves):
    series = curves.Series([51], [2.0])
    dots = coloured(curves.plot(series, series.values, ("", ""), (1, 101)), curves.INK)
    middle = (curves.LEFT + curves.WIDTH - curves.RIGHT) // 2
    assert [(x, y) for x, y in dots if abs(x - middle) <= 2 and curves.TOP < y < curves.HEIGHT - curves.BOTTOM]


@pytest.mark.parametrize("count, size", [(1, (1, 1)), (2, (2, 1)), (3, (2, 2)), (7, (2, 4))])
def test_plots_stand_two_in_a_row(curves, count, size):
    series = {name: curves.Series([1], [1.0]) for name in list(curves.TITLES)[:count]}
    assert curves.learning_curves(series, 20).size == (size[0] * curves.WIDTH, size[1] * curves.HEIGHT)
