"""Frames over real pipes: in any pieces, of any length, and never waiting for the other side."""

import multiprocessing
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.workers.frames import FrameReader, FrameWriter


@pytest.fixture
def pipe():
    """The reading and the writing end."""
    ends = multiprocessing.Pipe(duplex=False)
    yield ends
    for end in ends:
        end.close()


def test_frames_in_turns_while_neither_side_waits(pipe):
    payloads = [b"first", b"", b"x" * 1_000_000, b"last"]
    writer, reader = FrameWriter(pipe[1]), FrameReader(pipe[0])
    for payload in payloads:
        writer.put(payload)
    assert writer.has_backlog
    received = []
    while len(received) < len(payloads):
        assert reader.fill()
        received += reader.frames()
        writer.flush()
    assert received == payloads
    assert not writer.has_backlog
    assert not reader.fill(), "there is nothing left, and nobody waits for it"


def test_what_multiprocessing_wrote_is_read(pipe):
    reader = FrameReader(pipe[0])
    pipe[1].send_bytes(b"while it loads")
    FrameWriter(pipe[1]).put(b"and when it works")
    assert reader.fill()
    assert list(reader.frames()) == [b"while it loads", b"and when it works"]


@settings(max_examples=50, deadline=None)
@given(payloads=st.lists(st.binary(max_size=40), max_size=6), cut=st.integers(1, 50))
def test_any_pieces_make_the_same_frames(payloads, cut):
    reading, writing = multiprocessing.Pipe(duplex=False)
    carrier, source = multiprocessing.Pipe(duplex=False)
    with reading, writing, carrier, source:
        for payload in payloads:
            source.send_bytes(payload)
        stream = os.read(carrier.fileno(), 65536) if payloads else b""
        reader, received = FrameReader(reading), []
        for start in range(0, len(stream), cut):
            os.write(writing.fileno(), stream[start : start + cut])
            assert reader.fill()
            received += reader.frames()
        assert received == payloads


def test_half_a_frame_is_none_and_the_end_is_told(pipe):
    writer, reader = FrameWriter(pipe[1]), FrameReader(pipe[0])
    writer.put(b"x" * 1_000_000)
    while reader.fill():
        assert list(reader.frames()) == []
    pipe[1].close()
    with pytest.raises(EOFError):
        reader.fill()


def test_a_reader_that_is_gone_is_told(pipe):
    writer = FrameWriter(pipe[1])
    pipe[0].close()
    with pytest.raises(BrokenPipeError):
        writer.put(b"to nobody")
