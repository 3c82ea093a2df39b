"""Style Similarity, Identity Similarity and Prompt Fidelity in whole prompts."""

import json

import pytest

from harness.training import node, one_sentence


def pictures(count: int, style: str = "any", seed: int = 1, **more) -> dict:
    return node("CounterpointPocketPictures", count=count, style=style, seed=seed, **more)


def base() -> dict:
    """1 features, 2 and 3 comics, 4 chalk."""
    return {
        "1": node("CounterpointLoadFeatures"),
        "2": pictures(12, "comic", 1, captions="content and style"),
        "3": pictures(12, "comic", 2, captions="content and style"),
        "4": pictures(12, "chalk", 3),
    }


def facts(run, id: str) -> dict:
    return json.loads(run.value(id, 2))


def test_the_same_style_is_nearer_than_another(graph):
    run = graph({
        **base(),
        "5": node("CounterpointStyleSimilarity", features=["1", 0], made=["2", 0], reference=["3", 0], others=["4", 0]),
        "6": node("CounterpointStyleSimilarity", features=["1", 0], made=["4", 0], reference=["3", 0], others=["2", 0]),
    })  # fmt: skip
    same, other = facts(run, "5"), facts(run, "6")
    assert same["cosine"]["low"] > other["cosine"]["high"]
    assert same["corrected"]["mean"] > other["corrected"]["mean"]
    assert run.outputs["5"][0] == pytest.approx(same["cosine"]["values"], abs=1e-5)
    assert run.value("5", 1).startswith("Style similarity, as Pocket sees it: cosine")


def test_without_others_there_is_no_corrected_score(graph):
    run = graph(
        {**base(), "5": node("CounterpointStyleSimilarity", features=["1", 0], made=["2", 0], reference=["3", 0])}
    )
    assert list(facts(run, "5")) == ["cosine"]


def test_identity_looks_at_the_object_and_not_around_it(graph):
    """The same object before two backgrounds: nearer when it is cut out."""
    same = {"shape": "star", "colour": "red", "pattern": "plain"}
    two = {
        "1": node("CounterpointLoadFeatures"),
        "2": pictures(6, "photo", 1, background="night", **same),
        "3": pictures(6, "photo", 1, background="snow", **same),
    }
    masks = {"made_masks": ["2", 2], "reference_masks": ["3", 2]}
    ways = {"5": {}, "6": masks}
    run = graph({**two, **{k: node("CounterpointIdentitySimilarity", features=["1", 0], made=["2", 0], reference=["3", 0], **v)
                           for k, v in ways.items()}})  # fmt: skip
    assert facts(run, "6")["nearest"]["mean"] > facts(run, "5")["nearest"]["mean"]
    assert facts(run, "6")["nearest"]["mean"] > 0.95


def test_pockets_objects_are_told_apart_by_their_pattern(graph):
    """Three times the same shape, colour and pattern: one object, itself elsewhere, and another one."""
    look = {"shape": "cube", "colour": "red", "pattern": "striped", "style": "photo"}
    run = graph({
        "1": node("CounterpointLoadFeatures", extractor="Pocket's objects"),
        "2": pictures(8, seed=1, same_object=4, **look),
        "3": pictures(8, seed=2, same_object=4, **look),
        "4": pictures(8, seed=3, same_object=9, **look),
        **{k: node("CounterpointIdentitySimilarity", features=["1", 0], made=[made, 0], reference=["2", 0])
           for k, made in (("5", "3"), ("6", "4"))},
    })  # fmt: skip
    same, other = (facts(run, k)["mean cosine"] for k in "56")
    assert same["low"] > other["high"]


def test_one_picture_has_no_interval(graph):
    two = {"1": node("CounterpointLoadFeatures"), "2": pictures(1), "3": pictures(4, seed=2)}
    run = graph({**two, "5": node("CounterpointStyleSimilarity", features=["1", 0], made=["2", 0], reference=["3", 0])})
    assert "low" not in facts(run, "5")["cosine"] and run.value("5", 1).endswith("; 1 picture")


def test_masks_of_another_set(graph):
    wrong = node(
        "CounterpointIdentitySimilarity", features=["1", 0], made=["2", 0], reference=["3", 0], made_masks=["5", 2]
    )
    run = graph({**base(), "5": pictures(3), "6": wrong}, check=False)
    one_sentence(run, "3 masks for the 12 pictures of 'made'", "give 1 each")


def test_prompts_of_their_own_and_of_others(graph):
    run = graph({
        **base(),
        "5": node("CounterpointPromptFidelity", features=["1", 0], images=["2", 0], captions=["2", 1]),
        "6": node("CounterpointPromptFidelity", features=["1", 0], images=["2", 0], captions=["3", 1]),
    })  # fmt: skip
    own, others = facts(run, "5"), facts(run, "6")
    assert own["CLIP score"]["low"] > others["CLIP score"]["high"]
    assert own["R-precision"]["mean"] > 0.5 > others["R-precision"]["mean"]


def test_one_caption_for_all(graph, given):
    whole = {
        **base(),
        "5": given("STRING", ["a picture"]),
        "6": node("CounterpointPromptFidelity", features=["1", 0], images=["2", 0], captions=["5", 0]),
    }
    assert list(facts(graph(whole), "6")) == ["CLIP score"]


def test_captions_of_another_number(graph, given):
    whole = {
        **base(),
        "5": given("STRING", ["a", "b"]),
        "6": node("CounterpointPromptFidelity", features=["1", 0], images=["2", 0], captions=["5", 0]),
    }
    one_sentence(graph(whole, check=False), "2 captions for 12 pictures", "give 1 each, or 1 for all")


def test_an_extractor_that_cannot_read(graph):
    blind = node("CounterpointLoadFeatures", extractor="the CLIP_VISION that is connected", clip_vision=["7", 3])
    asked = node("CounterpointPromptFidelity", features=["1", 0], images=["2", 0], captions=["2", 1])
    run = graph({**base(), "1": blind, "7": node("CounterpointLoadPocketModels"), "6": asked}, check=False)
    one_sentence(run, "sees and cannot read", "choose Pocket")
