"""Images: the numpy path, and cv_bridge where it is installed, read every layout alike and refuse the rest."""

import array
import importlib.util
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sensor_msgs.msg import Image

from diwa_core.errors import ContractError
from diwa_ros.images import load_reader, make_image, read_image_numpy


def read_with_cv_bridge(message):
    read, which = load_reader()
    assert which == "images: cv_bridge", which
    return read(message)


has_cv_bridge = importlib.util.find_spec("cv_bridge") is not None
readers = pytest.mark.parametrize(
    "read",
    [
        pytest.param(read_image_numpy, id="numpy"),
        pytest.param(read_with_cv_bridge, id="cv_bridge", marks=pytest.mark.skipif(not has_cv_bridge, reason="cv_bridge is not installed")),
    ],
)


def encode(rgb, encoding, padding=0, big_endian=0):
    """An Image message of `rgb`, written independently of the code under test."""
    pixels = {"rgb8": rgb, "bgr8": rgb[:, :, [2, 1, 0]], "mono8": rgb[:, :, :1]}[encoding]
    rows = [row.tobytes() + b"\xab" * padding for row in pixels]
    message = Image(height=rgb.shape[0], width=rgb.shape[1], encoding=encoding, step=len(rows[0]), is_bigendian=big_endian)
    message.data = array.array("B", b"".join(rows))
    return message


@readers
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    encoding=st.sampled_from(["rgb8", "bgr8", "mono8"]),
    padding=st.integers(0, 5),
    big_endian=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_every_layout_reads_as_the_same_rgb(read, size, encoding, padding, big_endian, seed):
    rgb = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    if encoding == "mono8":
        rgb = np.repeat(rgb[:, :, :1], 3, axis=2)
    image = read(encode(rgb, encoding, padding, big_endian))
    assert image.dtype == np.uint8 and np.array_equal(image, rgb)


@readers
@pytest.mark.parametrize(
    "change, words",
    [
        ({"encoding": "16UC1"}, "found '16UC1'"),
        ({"encoding": "rgba8"}, "found 'rgba8'"),
        ({"encoding": ""}, "expected one of rgb8, bgr8, mono8"),
        ({"step": 11}, "rows of at least 12 bytes"),
        ({"height": 9}, "expected 108 bytes, found 48"),
        ({"width": 0}, "image layout"),
    ],
)
def test_other_encodings_and_broken_layouts_are_refused(read, change, words):
    message = encode(np.zeros((4, 4, 3), np.uint8), "rgb8")
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(ContractError, match=words):
        read(message)


def test_round_trip_of_a_view_that_is_not_contiguous():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)[::2, ::-1]
    message = make_image(image, 1_500_000_000, "camera")
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1, 500_000_000)
    assert np.array_equal(read_image_numpy(message), image)


@pytest.mark.parametrize("behaviour, words", [("raises", "fails"), ("swaps", "changes colours"), ("works", "images: cv_bridge")])
def test_cv_bridge_is_used_only_if_it_works(monkeypatch, behaviour, words):
    """The index's cv-bridge is a broken repackaging: one pixel decides, and the log says which path is used."""

    class CvBridge:
        def imgmsg_to_cv2(self, message, desired_encoding):
            if behaviour == "raises":
                raise TypeError("built for another numpy")
            image = read_image_numpy(message)
            return image[:, :, ::-1] if behaviour == "swaps" else image

    module = types.ModuleType("cv_bridge")
    module.CvBridge = CvBridge
    monkeypatch.setitem(sys.modules, "cv_bridge", module)
    read, which = load_reader()
    assert words in which
    rgb = np.random.default_rng(1).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    assert np.array_equal(read(encode(rgb, "bgr8", padding=2)), rgb)
