#!/usr/bin/env bash
# One machine's share of the graph: bash docker/run_host.sh robot|policy|recorder|finetune [name:=value ...], or what belongs to it:
# ... teleop, ... doctor, ... operator COMMAND (any command, on the same network and with the operator's keys).
# The same in the containers and without them, on the pip path (.venv) and on the ROS path (.venv-ros). Variables: docker/example.env.
set -eo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
role=${1:-}
shift || true

robot=${DIWA_ROBOT:-robot}
graph=(real:=true "robot:=$robot" "checkpoint:=${DIWA_CHECKPOINTS:-checkpoints}" "commands_from:=${DIWA_COMMANDS_FROM:-policy}")
graph+=("contract:=${DIWA_CONTRACT:-}" "device:=${DIWA_DEVICE:-cpu}")
controller=franka_controller
if [ "$robot" = fake-fr3 ]; then
  controller=fake_fr3,franka_controller
fi
case $role in
  robot) words=(up deploy "${graph[@]}" "$@" --only "$controller") ;;
  policy) words=(up deploy "${graph[@]}" "$@" --only encoder,policy) ;;
  recorder) words=(up record "folder:=${DIWA_BAGS:-runs/bags}" "contract:=${DIWA_CONTRACT:-}" record:=false "$@") ;;
  finetune) words=(up loop "checkpoint:=${DIWA_CHECKPOINTS:-checkpoints}" "$@" --only finetune) ;;
  teleop | doctor | operator) words=() ;;
  *)
    echo "run_host.sh: expected robot, policy, recorder, finetune, teleop, doctor or operator, found '$role'." >&2
    exit 2
    ;;
esac

enter=(bash docker/enter_workspace.sh)
if [ -x .venv/bin/diwa ]; then
  enter=()
  export PATH="$PWD/.venv/bin:$PATH"
fi

export FASTDDS_DEFAULT_PROFILES_FILE=$PWD/config/fastdds.xml ROS_AUTOMATIC_DISCOVERY_RANGE=SYSTEM_DEFAULT
if [ -n "${DIWA_KEYSTORE:-}" ]; then
  export ROS_SECURITY_ENABLE=true ROS_SECURITY_STRATEGY=Enforce ROS_SECURITY_KEYSTORE=$DIWA_KEYSTORE
fi
if [ -n "${DIWA_ADDRESS:-}" ]; then
  if [ -z "${DIWA_KEYSTORE:-}" ] && [ "${DIWA_OPEN_NETWORK:-no}" != yes ]; then
    echo "run_host.sh: expected DIWA_KEYSTORE beside DIWA_ADDRESS, found none: without keys everybody on that network can command the arm." >&2
    echo "             Make keys (docs/safety.md), leave DIWA_ADDRESS out to stay on this machine, or say DIWA_OPEN_NETWORK=yes." >&2
    exit 2
  fi
  read -ra peers <<< "${DIWA_PEERS:-$DIWA_ADDRESS}"
  FASTDDS_DEFAULT_PROFILES_FILE=$PWD/runs/fastdds-$role.xml
  "${enter[@]}" python scripts/dds_profile.py --address "$DIWA_ADDRESS" --peers "${peers[@]}" --out "$FASTDDS_DEFAULT_PROFILES_FILE"
fi
export FASTRTPS_DEFAULT_PROFILES_FILE=$FASTDDS_DEFAULT_PROFILES_FILE

dry=${DIWA_DRY_RUN:-no}
if [ "$role" = teleop ]; then
  keys=()
  if [ -n "${DIWA_KEYSTORE:-}" ]; then keys=(--enclave /teleop); fi
  parameters=(-p "source:=keyboard" -p "contract:='${DIWA_CONTRACT:-}'" -p "skill:='${DIWA_SKILL:-}'" -p "speed:=${DIWA_SPEED:-0.2}")
  command=(python -m diwa_ros.teleop --ros-args "${parameters[@]}" "${keys[@]}" "$@")
elif [ "$role" = doctor ]; then
  if [ ! -f "$robot" ]; then robot=config/${robot//-/_}.yaml; fi
  command=(diwa doctor --robot "$robot" "$@")
elif [ "$role" = operator ]; then
  if [ -n "${DIWA_KEYSTORE:-}" ]; then export ROS_SECURITY_ENCLAVE_OVERRIDE=/operator; fi
  command=("$@")
else
  if [ "$dry" = yes ]; then words+=(--dry-run); fi
  exec "${enter[@]}" diwa "${words[@]}"
fi
if [ "$dry" = yes ]; then
  echo "${command[@]}"
  exit 0
fi
exec "${enter[@]}" "${command[@]}"
