"""sensor_msgs/Image <-> uint8 RGB arrays: cv_bridge where an ordinary ROS 2 has it, an equal numpy path elsewhere."""

from __future__ import annotations

import array
import importlib
from collections.abc import Callable

import numpy as np
from sensor_msgs.msg import Image

from diwa_core.data.messages import check_layout
from diwa_core.data.messages import read_image as read_image_numpy
from diwa_ros.messages import to_time


def load_reader() -> tuple[Callable[[Image], np.ndarray], str]:
    """The image reader of this installation and a sentence for the log that says which one it is and why."""
    try:
        bridge = importlib.import_module("cv_bridge").CvBridge()
        probe = make_image(np.array([[[1, 2, 3]]], dtype=np.uint8), 0, "probe")
        if bridge.imgmsg_to_cv2(probe, desired_encoding="rgb8").tolist() != [[[1, 2, 3]]]:
            return read_image_numpy, "images: numpy (cv_bridge is installed but changes colours)"
    except ImportError:
        return read_image_numpy, "images: numpy (cv_bridge is not installed)"
    except Exception as error:  # cv_bridge built for another numpy or OpenCV fails in many ways; the equal path is at hand
        return read_image_numpy, f"images: numpy (cv_bridge is installed but fails: {error})"

    def read_image(message: Image) -> np.ndarray:
        check_layout(message)
        return np.asarray(bridge.imgmsg_to_cv2(message, desired_encoding="rgb8"))

    return read_image, "images: cv_bridge"


def make_image(image: np.ndarray, stamp_ns: int, frame_id: str) -> Image:
    """uint8 RGB [H, W, 3] -> rgb8 Image."""
    message = Image(height=image.shape[0], width=image.shape[1], encoding="rgb8", step=image.shape[1] * 3)
    message.header.stamp = to_time(stamp_ns)
    message.header.frame_id = frame_id
    message.data = array.array("B", np.ascontiguousarray(image).tobytes())
    return message
