"""ros2 launch diwa_ros record.launch.py [name:=...] [skill:=...]: the recorder beside a running graph, the same as `diwa up record`.

Reads config/record.yaml; `--show-args` lists its arguments.
"""

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from diwa_ros.graph import load_graph


def to_actions(context: LaunchContext) -> list[Node]:
    """The recorder with the arguments as they are now."""
    graph = load_graph("record")
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in graph.description.arguments}
    return [
        Node(
            package="diwa_ros",
            executable=process.executable,
            name=process.name,
            parameters=[process.parameters],
            additional_env=process.extra_environment,
            ros_arguments=process.enclave,
            output="both",
        )
        for process in graph.resolve(given)
    ]


def generate_launch_description() -> LaunchDescription:
    """Called by ros2 launch."""
    declared = []
    for argument in load_graph("record").description.arguments:
        default = argument.default if isinstance(argument.default, str) else str(argument.default).lower()
        declared.append(DeclareLaunchArgument(argument.name, default_value=default, description=argument.help))
    return LaunchDescription([*declared, OpaqueFunction(function=to_actions)])
