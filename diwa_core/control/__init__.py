"""Robot-side control without ROS and without a robot: arm limits, the robot's configuration, smooth targets."""
