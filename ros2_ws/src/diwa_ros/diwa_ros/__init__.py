"""The nodes: they translate between ROS messages and diwa_core, and decide nothing that diwa_core can decide."""
