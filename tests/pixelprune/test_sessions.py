"""pred3d: the compiled rule against the definition in lists, and sessions restored by a decoder of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelprune.selection import select
from pixelprune.sessions import decode_session, encode_session, select_session
from tests.pixelprune.selection_reference import distance, mosaic, reference_select

SAMPLES = Path(__file__).parents[2] / "data_tools" / "samples" / "images"
Place = tuple[int, int]


def grid_of(image: np.ndarray, side: int) -> dict[Place, np.ndarray]:
    rows, cols = image.shape[0] // side, image.shape[1] // side
    return {
        (r, c): image[r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(cols)
    }


def reference_rule(images, direction, metric, threshold, keep_replaced, borders, side):
    """(keep, origin, alone) of every image: lists of values, no arithmetic shared with the library."""
    order = list(range(len(images)))
    if direction == "backward":
        order.reverse()
    made, value_of, origin_of = {}, {}, {}
    for position, number in enumerate(order):
        image = images[number]
        keep2d, source2d = reference_select(image, "pred2d", metric, threshold, side)
        cols = keep2d.shape[1]
        own = grid_of(image, side)
        plain_value = {(r, c): own[divmod(int(source2d[r, c]), cols)] for r, c in own}
        plain_origin = {(r, c): (number, int(source2d[r, c])) for r, c in own}
        other = order[position - 1] if position else None
        cut = other is None or max(other, number) in borders or images[other].shape != image.shape
        if cut:
            made[number] = (keep2d, plain_origin, True)
            value_of[number], origin_of[number] = plain_value, plain_origin
            continue
        before = value_of[other]

        def match(x, y):
            return distance(x, y, metric) <= threshold

        whole = (
            np.block([[[before[r, c]] for c in range(cols)] for r in range(keep2d.shape[0])]) if keep_replaced else 0
        )
        replaced = reference_select(whole, "pred2d", metric, threshold, side)[0] if keep_replaced else None
        value, origin, keep = {}, {}, np.zeros_like(keep2d)
        for r, c in own:
            spatial = None
            if r and c:
                a, b, corner = (r, c - 1), (r - 1, c), (r - 1, c - 1)
                spatial = b if match(value[corner], value[a]) and not match(value[corner], value[b]) else a
            elif r or c:
                spatial = (r - 1, c) if r else (r, c - 1)
            told = False
            for n in ((r, c - 1), (r - 1, c), (r - 1, c - 1)):
                if n in value and not match(value[n], before[n]) and origin[n][2] is not None:
                    told = told or match(value[n], origin[n][2])
            prediction = (value[spatial], origin[spatial][:2]) if told else (before[r, c], origin_of[other][r, c])
            expected = None if spatial is None else value[spatial]
            must = (r, c) == (0, 0) or (keep_replaced and replaced[r, c] and not match(own[r, c], before[r, c]))
            if not must and match(own[r, c], prediction[0]):
                value[r, c], origin[r, c] = prediction[0], (*prediction[1], expected)
            else:
                value[r, c], origin[r, c] = own[r, c], (number, r * cols + c, expected)
                keep[r, c] = True
        if keep2d.sum() <= keep.sum():
            made[number] = (keep2d, plain_origin, True)
            value_of[number], origin_of[number] = plain_value, plain_origin
        else:
            plain = {place: found[:2] for place, found in origin.items()}
            made[number] = (keep, plain, False)
            value_of[number], origin_of[number] = value, plain
    return [made[number] for number in range(len(images))]


def walk(seed: int, rows: int, cols: int, side: int, steps: int, noise: int) -> list[np.ndarray]:
    """Screenshots of a session: panels open, close, move; some steps change nothing, some show another page."""
    rng = np.random.default_rng(seed)
    pages = [mosaic(rng, rows, cols, side, 3, 4, noise) for _ in range(2)]
    images = [pages[0]]
    for _ in range(steps):
        kind = rng.integers(0, 4)
        image = images[-1].copy()
        if kind == 0:
            r, c = rng.integers(0, rows), rng.integers(0, cols)
            image[r * side : (r + 2) * side, c * side : (c + 3) * side] = rng.integers(0, 256, 3)
        elif kind == 1:
            image = pages[rng.integers(0, 2)].copy()
        elif kind == 2:
            image = np.roll(image, side, axis=0)
        images.append(image)
    return images


sessions = st.builds(
    lambda seed, rows, cols, side, steps, noise: (walk(seed, rows, cols, side, steps, noise), side),
    st.integers(0, 2**32 - 1),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from([1, 3, 8, 32]),
    st.integers(0, 4),
    st.integers(0, 5),
)
rules = st.tuples(
    st.sampled_from(["backward", "forward"]),
    st.sampled_from(["max", "mae"]),
    st.sampled_from([0.0, 0.0, 2 / 255, 0.02, 0.2]),
    st.booleans(),
    st.sampled_from([(), (1,)]),
)


@settings(max_examples=120, deadline=None)
@given(sessions, rules)
def test_the_compiled_rule_is_the_definition(session, rule):
    images, side = session
    direction, metric, threshold, replaced, borders = rule
    borders = borders if len(images) > 1 else ()
    replaced = replaced and direction == "forward"
    made = select_session(
        images,
        direction=direction,
        metric=metric,
        threshold=threshold,
        keep_replaced=replaced,
        borders=borders,
        block=side,
    )
    expected = reference_rule(images, direction, metric, threshold, replaced, borders, side)
    for selection, (keep, origin, alone) in zip(made, expected, strict=True):
        assert selection.alone == alone
        np.testing.assert_array_equal(selection.keep, keep)
        rows, cols = keep.shape
        assert [[tuple(selection.origin[r, c]) for c in range(cols)] for r in range(rows)] == [
            [origin[r, c] for c in range(cols)] for r in range(rows)
        ]


@settings(max_examples=120, deadline=None)
@given(sessions, rules)
def test_sessions_are_restored(session, rule):
    """Propositions 1 and 2, over time: the decoder sees kept blocks, masks and bits alone."""
    images, side = session
    direction, metric, threshold, replaced, borders = rule
    options = {"keep_replaced": replaced and direction == "forward", "borders": borders if len(images) > 1 else ()}
    compressed = encode_session(images, direction=direction, metric=metric, threshold=threshold, block=side, **options)
    selections = select_session(images, direction=direction, metric=metric, threshold=threshold, block=side, **options)
    for number, (image, restored) in enumerate(zip(images, decode_session(compressed), strict=True)):
        if threshold == 0:
            np.testing.assert_array_equal(restored, image)
        own, back = grid_of(image, side), grid_of(restored, side)
        cols = image.shape[1] // side
        for place, block in own.items():
            assert distance(block, back[place], metric) <= threshold
            source, flat = selections[number].origin[place]
            np.testing.assert_array_equal(back[place], grid_of(images[source], side)[divmod(int(flat), cols)])


def test_no_image_keeps_more_than_pred2d_and_an_idle_step_keeps_one_block():
    images = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(SAMPLES.glob("*light.png"))[:1]]
    page = images[0][: images[0].shape[0] // 32 * 32, : images[0].shape[1] // 32 * 32]
    opened = page.copy()
    opened[64:256, 320:480] = 250
    session = [page, page, opened, page]
    plain = [select(image).num_kept for image in session]
    forward = select_session(session, direction="forward")
    backward = select_session(session)
    assert all(selection.num_kept <= most for selection, most in zip(forward, plain, strict=True))
    assert all(selection.num_kept <= most for selection, most in zip(backward, plain, strict=True))
    assert [selection.alone for selection in backward] == [False, False, False, True]
    assert (forward[0].num_kept, forward[1].num_kept) == (plain[0], 1)
    assert backward[0].num_kept == 1
    # The panel closes: what it had covered was last seen two steps before, and one step back is all that is looked at.
    assert 1 < forward[3].num_kept < plain[3] / 4


def test_what_was_replaced_by_nothing_can_be_kept():
    """A dialog closes and leaves flat ground: omitted as pred2d predicts it, or kept where something stood."""
    empty = np.full((192, 192, 3), 240, np.uint8)
    dialog = empty.copy()
    dialog[64:128, 64:160] = mosaic(np.random.default_rng(0), 2, 3, 32, 5, 20, 0)
    quiet = select_session([dialog, empty], direction="forward")[1]
    told = select_session([dialog, empty], direction="forward", keep_replaced=True)[1]
    assert quiet.alone
    assert quiet.num_kept == 1
    # pred2d alone keeps one block, and it is complete by itself: nothing of the neighbour is left in it.
    assert told.alone
    # Where the rest of the page makes prediction in time worth it, the changed places are kept.
    page = mosaic(np.random.default_rng(1), 12, 12, 32, 9, 20, 0)
    shown = page.copy()
    shown[64:128, 64:160] = mosaic(np.random.default_rng(0), 2, 3, 32, 5, 20, 0)
    page[64:128, 64:160] = page[64, 32]
    changed = np.argwhere((page != shown).reshape(12, 32, 12, 32, 3).any(axis=(1, 3, 4)))
    told = select_session([shown, page], direction="forward", keep_replaced=True)[1]
    there = select(shown).keep
    assert not told.alone
    assert all(told.keep[r, c] for r, c in changed if there[r, c])
    assert told.num_kept > select_session([shown, page], direction="forward")[1].num_kept


def test_images_of_another_size_and_borders_are_coded_alone():
    small, large = (
        mosaic(np.random.default_rng(0), 3, 4, 32, 4, 9, 0),
        mosaic(np.random.default_rng(1), 4, 4, 32, 4, 9, 0),
    )
    assert [s.alone for s in select_session([small, small, large, large])] == [False, True, False, True]
    assert [s.alone for s in select_session([small, small, small], borders=[2])] == [False, True, True]
    assert select_session([]) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "sideways"}, "direction: expected one of backward, forward, got 'sideways'"),
        ({"keep_replaced": True}, "keep_replaced: belongs to direction='forward'"),
        ({"borders": [0]}, "borders: expected numbers of images from 1 to 1, got 0"),
        ({"metric": "psnr"}, "prune.metric: expected one of max, mae"),
        ({"block": 7}, "multiples of 7"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    images = [np.zeros((64, 64, 3), np.uint8)] * 2
    with pytest.raises(ValueError, match=words):
        select_session(images, **options)


def test_a_session_that_lost_its_neighbour_is_not_decoded():
    image = mosaic(np.random.default_rng(0), 3, 4, 32, 4, 9, 0)
    whole = encode_session([image, image])
    cut = type(whole)(whole.blocks[:1], whole.keeps[:1], whole.alone[:1], "backward", "max", 0.0)
    with pytest.raises(ValueError, match="image 0: it was predicted from its neighbour, which is not there"):
        decode_session(cut)
    short = type(whole)((whole.blocks[0][:0], whole.blocks[1]), whole.keeps, whole.alone, "backward", "max", 0.0)
    with pytest.raises(ValueError, match="the mask keeps 1 blocks, but 0 came"):
        decode_session(short)
