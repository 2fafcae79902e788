"""Recordings as conversations: the frames that differ, at the times they began, of real video files."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main
from data_tools.convert.dropped import DropError
from data_tools.recording.frames import FrameSettings, changed_share, sample_frames
from pixelprune.records.reader import parse_record
from pixelprune.records.record import RecordError


def test_blocks_at_the_edges_count_by_what_they_hold() -> None:
    one = np.zeros((40, 70, 3), np.uint8)  # 2 x 3 blocks, of which the outer ones are cut off
    other = one.copy()
    other[32:, 64:] = 9
    other[:32, :32] = 4  # as much as is allowed
    assert changed_share(one, other, 4.0) == pytest.approx(1 / 6)
    assert changed_share(one, other, 3.9) == pytest.approx(2 / 6)
    assert changed_share(one, one, 0.0) == 0


def screen(number: int) -> np.ndarray:
    """A page that shows `number` dark rows of text."""
    image = np.full((192, 256, 3), 235, np.uint8)
    for row in range(number):
        image[8 + 24 * row : 20 + 24 * row, 16:240:3] = 40
    return image


def write_video(path: Path, shown: list[tuple[float, int]], codec: str = "mpeg4") -> None:
    """A video that shows screen(number) from each time on; frames are written only where there is one."""
    av = pytest.importorskip("av", reason="PyAV is not installed (pip install pixelprune[recordings])")
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 256, 192, "yuv420p", 4_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for seconds, number in shown:
            frame = av.VideoFrame.from_ndarray(screen(number), format="rgb24")
            frame.pts, frame.time_base = round(seconds * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_frames_that_differ_are_taken_at_the_time_they_began(tmp_path: Path) -> None:
    # Recorders write no frame while nothing moves: 0.1 s of it, then five seconds of silence.
    write_video(tmp_path / "a.mkv", [(0, 1), (0.04, 1), (0.1, 2), (5.0, 2), (5.1, 2), (5.2, 3), (6.5, 3), (6.9, 1)])
    counts: Counter[str] = Counter()
    frames = sample_frames(tmp_path / "a.mkv", FrameSettings(), counts)
    assert [frame.seconds for frame in frames] == [0.0, 0.1, 5.2, 6.9]
    for frame, number in zip(frames, (1, 2, 3, 1), strict=True):
        assert np.abs(frame.image.astype(int) - screen(number)).mean() < 12  # the codec's loss, colour at half size
        assert frame.image.shape == (192, 256, 3)
    assert counts["taken"] == 4
    assert counts["looked at"] == counts["taken"] + counts["unchanged"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_frames": 2}, "more than 2 frames that differ"),
        ({"max_seconds": 1.0}, "longer than 1 seconds"),
    ],
)
def test_what_is_too_much_is_left_out_whole(tmp_path: Path, settings: dict, reason: str) -> None:
    write_video(tmp_path / "a.mkv", [(0, 1), (0.6, 2), (1.2, 3), (1.8, 4)])
    with pytest.raises(DropError, match=reason):
        sample_frames(tmp_path / "a.mkv", FrameSettings(**settings), Counter())


def test_files_that_are_no_video_are_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://example.com/a.ts\n")
    (tmp_path / "a.ts").write_bytes(b"G" * 188)
    for name, reason in (("list.mp4", "video unreadable"), ("a.ts", "not one of .mp4"), ("no.mp4", "video missing")):
        with pytest.raises(DropError, match=reason):
            sample_frames(tmp_path / name, FrameSettings(), Counter())


def test_records_with_videos_become_records_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "a.mp4", [(0, 1), (1.0, 2), (2.0, 3)])
    rows = [
        {"id": "r", "messages": [
            {"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "New?"}]},
            {"role": "assistant", "content": "A row came."}]},
        {"id": "fps", "messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1}]}]},
        {"id": "out", "messages": [{"role": "user", "content": [{"type": "video", "video": "../a.mp4"}]}]},
        {"id": "none", "messages": [{"role": "user", "content": "Hello"}]},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["recording", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    (made,) = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    record = parse_record(made)
    texts = [part for part in record.messages[0].parts if isinstance(part, str)]
    assert texts == ["<0.0 seconds>", "<1.0 seconds>", "<2.0 seconds>", "New?"]
    assert [Image.open(tmp_path / str(image.source)).size for image in record.images] == [(256, 192)] * 3
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["dropped"]["records"] == {
        "a video part has 'fps', which is not read": 1,
        "video outside the folder of its records": 1,
        'no part of type "video"': 1,
    }
    assert main(["recording", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "b.jsonl")]) == 2
    assert "--question" in capsys.readouterr().err
    assert main(["recording", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "b.jsonl"), "--question", "What?"]) == 0
    assert len(parse_record(json.loads((tmp_path / "b.jsonl").read_text())).images) == 3


@pytest.mark.parametrize("key", ["videos", "video"])
def test_videos_beside_the_turns_are_refused_with_the_way_out(key: str) -> None:
    row = {
        "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}],
        key: ["a.mp4"],
    }
    with pytest.raises(RecordError, match="data_tools recording") as caught:
        parse_record(row)
    assert caught.value.reason == "unread_key"
    typed = {"messages": [{"role": "user", "content": [{"type": "video", key: "a.mp4"}]}, row["messages"][1]]}
    with pytest.raises(RecordError, match="'video', expected text or image; data_tools recording"):
        parse_record(typed)
