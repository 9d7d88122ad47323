"""ros2 launch diwa_ros deploy.launch.py [sim:=true] [skill:=...] [config:=deploy]: the same graph as `diwa up deploy`.

Both read config/deploy.yaml; `--show-args` lists its arguments. `config` is a description's name or path.
"""

import sys

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from diwa_ros.graph import Process, load_graph, select_nodes


def chosen_config() -> str:
    """Arguments are declared before launch has read the command line, and which ones there are depends on `config`."""
    given = [word.removeprefix("config:=") for word in sys.argv if word.startswith("config:=")]
    return given[-1] if given else "deploy"


def to_action(process: Process) -> Node:
    """One process as a launch action; the end of a required one shuts the launch down and says which."""
    return Node(
        package="diwa_ros",
        executable=process.executable,
        name=process.name,
        namespace=process.namespace,
        parameters=[process.parameters],
        remappings=list(process.remaps.items()),
        additional_env=process.extra_environment,
        ros_arguments=process.enclave,
        output="both",
        on_exit=Shutdown(reason=f"node '{process.name}' ended") if process.required else None,
    )


def to_actions(context: LaunchContext) -> list[Node]:
    """The processes for the arguments as they are now."""
    graph = load_graph(LaunchConfiguration("config").perform(context))
    given = {argument.name: LaunchConfiguration(argument.name).perform(context) for argument in graph.description.arguments}
    only = LaunchConfiguration("only").perform(context)
    return [to_action(process) for process in select_nodes(graph.resolve(given), only)]


def generate_launch_description() -> LaunchDescription:
    """Called by ros2 launch."""
    config = chosen_config()
    declared = [DeclareLaunchArgument("config", default_value=config, description="graph description: a name in config/ or a path")]
    declared.append(DeclareLaunchArgument("only", default_value="", description="start these nodes alone, as encoder,policy; empty: all"))
    for argument in load_graph(config).description.arguments:
        default = argument.default if isinstance(argument.default, str) else str(argument.default).lower()
        declared.append(DeclareLaunchArgument(argument.name, default_value=default, description=argument.help))
    return LaunchDescription([*declared, OpaqueFunction(function=to_actions)])
