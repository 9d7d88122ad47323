"""ros2 launch diwa_ros evaluate.launch.py [robot:=fake-fr3] [bags:=runs/bags] [trials:="--candidates A B --skills open_drawer"].

The deployed graph and a recorder, as `diwa evaluate robot` starts them. With `trials` it runs them too, and ends with them: Enter is then
`ros2 service call /evaluation/go std_srvs/srv/Trigger`, marks come by `diwa record mark`. Without, run them from a terminal of your own:
diwa evaluate robot --attach --on robot --robot fake-fr3 --candidates A B (docs/evaluation.md).
"""

import shlex
import sys

from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, OpaqueFunction, Shutdown
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from diwa_ros.graph import Process
from diwa_ros.trial_graph import trial_command, trial_graph

ARGUMENTS = {
    "robot": ("", "the robot's YAML: a name in config/ or a path, fake-fr3 for a simulated one; empty: the simulated table"),
    "checkpoint": ("checkpoints", "folder with world_model/, policies/ and classifiers/"),
    "real_time": ("false", "the simulated table on the clock instead of lock-step"),
    "bags": ("", "folder into which trials on the robot are recorded; empty: they are not"),
    "trials": ("", "arguments of diwa evaluate robot, as one word; empty: run it yourself"),
}


def to_action(process: Process) -> Node:
    """One process as a launch action; the end of a required one shuts the launch down and says which."""
    return Node(
        package="diwa_ros",
        executable=process.executable,
        name=process.name,
        parameters=[process.parameters],
        additional_env=process.extra_environment,
        output="both",
        on_exit=Shutdown(reason=f"node '{process.name}' ended") if process.required else None,
    )


def to_actions(context: LaunchContext) -> list[Node | ExecuteProcess]:
    """The graph for the arguments as they are now, and the trials."""
    values = {name: LaunchConfiguration(name).perform(context) for name in ARGUMENTS}
    real_time = values["real_time"].lower() == "true"
    processes = trial_graph(values["checkpoint"], values["robot"], real_time, values["bags"])
    actions = [to_action(process) for process in processes]
    if values["trials"]:
        words = trial_command(values["checkpoint"], values["robot"], real_time, values["bags"])
        command = [sys.executable, *words, *shlex.split(values["trials"])]
        environment = {name: value for process in processes for name, value in process.extra_environment.items()}
        ended = Shutdown(reason="the trials ended")
        actions.append(ExecuteProcess(cmd=command, additional_env=environment, output="screen", on_exit=ended))
    return actions


def generate_launch_description() -> LaunchDescription:
    """Called by ros2 launch."""
    declared = [DeclareLaunchArgument(name, default_value=default, description=text) for name, (default, text) in ARGUMENTS.items()]
    return LaunchDescription([*declared, OpaqueFunction(function=to_actions)])
