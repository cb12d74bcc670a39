"""What an exploration looks like, and what its scores cannot tell."""

import pytest

from m3jax.errors import M3Error
from m3jax.exploration import Result, check_picture, picture
from m3jax.exploration.pictures import Drawn, _shown
from m3jax.exploration.references import EQUAL
from m3jax.exploration.remarks import remarks_on


def result(sample, weights, score, reference=None):
    groups = {"model": weights} if weights else {}
    return Result(sample, groups, 1.0, {"a_$task": score}, 0.0, "model", reference=reference)


def exploration(experts, examples):
    names = tuple(f"/models/expert_{number}$" for number in range(experts))
    lines = [result(-1, (), 0.25, "base"), *(result(-2, (), 0.5, name) for name in names)]
    count = max(experts, 1)
    ratios = [tuple((1 + (i == j)) / (count + 1) for j in range(count)) for i in range(count)]
    samples = tuple(result(number, ratio, number / 8) for number, ratio in enumerate(ratios))
    lines.append(result(-9, (1 / count,) * count, 0.375, EQUAL))
    counts = {"a_$task": 8} if examples else {}
    return Drawn(samples[-1], samples, lines, names, counts)


@pytest.mark.parametrize(("experts", "examples"), [(1, True), (2, True), (2, False), (3, True), (5, False)])
def test_any_number_of_experts_is_drawn(tmp_path, experts, examples):
    picture(exploration(experts, examples), tmp_path / "found.svg")
    drawn = (tmp_path / "found.svg").read_text()
    assert drawn.count("<path") > 20
    with pytest.raises(M3Error, match="a picture's name ends in"):
        check_picture(tmp_path / "found.txt")
    with pytest.raises(M3Error, match="its parent does not exist"):
        check_picture(tmp_path / "no" / "found.png")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_picture_replaces_none_but_one_of_ours(tmp_path, ending):
    path = tmp_path / f"found.{ending}"
    picture(exploration(2, True), path)
    check_picture(path)
    path.write_bytes(path.read_bytes().replace(b"m3jax", b"Paint"))
    with pytest.raises(M3Error, match=r"is no picture of m3jax's, and would be replaced: move it, or choose another"):
        check_picture(path)


def test_long_names_are_told_apart():
    names = [f"org/llama-2-7b-{skill}-instruct-of-{skill}" for skill in ("math", "code")]
    assert [_shown(name, names) for name in names] == ["…math-instruct-of-math", "…code-instruct-of-code"]
    assert [_shown(name, names) for name in ("models/math", "x" * 40)] == ["math", f"{'x' * 11}…{'x' * 12}"]
    same = ["a-model-of-a-long-name-1", "a-model-of-a-long-name-1"]
    assert _shown(same[0], same) == same[0]


def test_what_scores_cannot_tell_is_said():
    def remarks(best, equal, count):
        samples = [result(0, (0.1, 0.9), 0.0), result(1, (0.3, 0.7), best / count)]
        beside = [result(-1, (0.5, 0.5), equal / count, EQUAL)]
        return " / ".join(remarks_on(samples[1], samples, beside, {"a_$task": count}))

    few = remarks(2, 0, 32)
    assert "no sample has more than 2 right answers of 32, so their order is chance" in few
    assert "on 32 examples of a_$task the chosen sample cannot be told apart from equal weights" in few
    assert "cannot be told apart" not in remarks(30, 10, 32)
    assert "cannot be told apart" in remarks(18, 16, 32)
    assert (
        remarks(30, 10, 32) == "its scores are of the examples that chose it, so they flatter it: evaluate it on others"
    )
    assert remarks_on(result(0, (1.0,), 0.5), [result(0, (1.0,), 0.5)], [], {}) == ()
    stopped = result(0, (0.1, 0.9), 0.0)._replace(share=0.5, most={"a_$task": 0.5})
    whole = result(1, (0.3, 0.7), 0.9)
    assert "so they flatter it" in remarks_on(whole, [stopped, whole], [], {"a_$task": 32})[0]
    assert remarks_on(whole, [whole], [], {"a_$task": 32}) == ()


def test_a_choice_that_is_no_better_than_an_expert_is_said():
    beside = [result(-1, (), 0.25, "base"), result(-2, (), 0.5, "a"), result(-3, (), 0.75, "b")]

    def remarks(weights, score):
        choice = result(0, weights, score)
        return " / ".join(remarks_on(choice, [choice], beside, {"a_$task": 32}, ["a", "b"]))

    assert remarks((0.4, 0.6), 0.75) == "the chosen sample is in no task better than b by itself"
    assert "better than a or b by itself" in remarks((0.4, 0.6), 0.5)
    assert remarks((0.4, 0.6), 0.875) == ""
    for weights, alone in [((0.0, 1.0), "b"), ((0.99999, 0.00001), "a"), ((0.0,), "a"), ((1.0,), "b")]:
        assert remarks(weights, 0.875) == (
            f"the chosen sample has all its weight on {alone}: nothing of the others is merged into it"
        )
    layers = result(0, (0.0, 1.0), 0.875)._replace(weights={"0": (0.0, 1.0), "1": (1.0, 0.0)})
    assert remarks_on(layers, [layers], beside, {"a_$task": 32}, ["a", "b"]) == ()
