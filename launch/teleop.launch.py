"""ros2 launch diwa_ros teleop.launch.py [joy_map:=spacemouse] [device:=joy]: joystick driver and teleoperation beside a running graph.

A keyboard needs the terminal itself: ros2 run diwa_ros teleop --ros-args -p source:=keyboard.
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration, PythonExpression
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from diwa_ros.graph import enclave_arguments

DRIVERS = {"joy": ("joy", "joy_node"), "spacenav": ("spacenav", "spacenav_node")}  # device -> package and executable


def generate_launch_description() -> LaunchDescription:
    """Called by ros2 launch."""
    arguments = [
        DeclareLaunchArgument("joy_map", default_value="gamepad", description="gamepad, spacemouse, or a YAML file"),
        DeclareLaunchArgument("device", default_value="joy", description=f"driver to start: {', '.join(DRIVERS)}, or none"),
        DeclareLaunchArgument("contract", default_value="", description="YAML file of the contract; empty: the play table's"),
        DeclareLaunchArgument("skill", default_value="", description="what is being shown"),
        DeclareLaunchArgument("speed", default_value="0.5", description="share of full speed"),
    ]
    chosen = LaunchConfiguration("device")
    drivers = [
        Node(
            package=package,
            executable=executable,
            remappings=[("spacenav/joy", "joy")],
            condition=IfCondition(PythonExpression(["'", chosen, f"' == '{device}'"])),
        )
        for device, (package, executable) in DRIVERS.items()
    ]
    types = {"joy_map": str, "contract": str, "skill": str, "speed": float}
    parameters = {name: ParameterValue(LaunchConfiguration(name), value_type=kind) for name, kind in types.items()}
    keys = enclave_arguments("", "teleop")
    teleop = Node(package="diwa_ros", executable="teleop", parameters=[{"source": "joy", **parameters}], ros_arguments=keys)
    return LaunchDescription([*arguments, *drivers, teleop])
