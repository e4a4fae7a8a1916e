#!/usr/bin/env bash
# A Slurm cluster of several nodes on one machine, for tests and experiments. It needs root and these packages:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#
#   slurm/cluster.sh up FOLDER [NODES]     start it; then: export SLURM_CONF=FOLDER/slurm.conf PATH=FOLDER/bin:$PATH
#   slurm/cluster.sh heal FOLDER           end all processes of every node that is not idle, and restart its daemon
#   slurm/cluster.sh down FOLDER           stop it
#
# Every node is a slurmd on the loopback device in its own namespaces, with its own host name (node1, node2, ...).
# Environment variables: GRACE (seconds from a preemption to the kill, default 10), KILL_WAIT (default 3), USER_SIGNAL
# (1: a preemption sends the signal of the job's --signal instead of SIGTERM; 0: it does not; default 1), CPUS (per
# node, default 8), PORTS (first port, default 17800).
set -euo pipefail

action=${1:-}
[ -n "${2:-}" ] || { sed -n '2,13p' "$0"; exit 2; }
folder=$(realpath -m "$2")
nodes=${3:-4}
first_port=${PORTS:-17800}
export SLURM_CONF=$folder/slurm.conf

write_configuration() {
  mkdir -p "$folder"/{state,log,munge,spool,gpus,bin}
  chmod 700 "$folder/munge"
  for i in 0 1 2 3 4 5 6 7; do ln -sfn /dev/null "$folder/gpus/gpu$i"; done  # Slurm counts them, but they cannot be used
  echo "Name=gpu File=$folder/gpus/gpu[0-7]" > "$folder/gres.conf"
  {
    echo "127.0.0.1 localhost $(hostname)"
    for ((n = 1; n <= nodes; n++)); do echo "127.0.0.1 node$n"; done
  } > "$folder/hosts"
  local send=""
  [ "${USER_SIGNAL:-1}" = 1 ] && send="SlurmctldParameters=preempt_send_user_signal"
  cat > "$SLURM_CONF" <<CONF
ClusterName=mmtrain
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$first_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job starts only after its credential has expired; 5 s is the minimum
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
$send
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=${KILL_WAIT:-3}
MinJobAge=86400
SlurmctldTimeout=30
SlurmdTimeout=30
GresTypes=gpu
CONF
  for ((n = 1; n <= nodes; n++)); do
    mkdir -p "$folder/spool/node$n"
    echo "NodeName=node$n NodeHostname=node$n NodeAddr=127.0.0.1 Port=$((first_port + n)) CPUs=${CPUS:-8}" \
      "RealMemory=8000 Gres=gpu:8" >> "$SLURM_CONF"
  done
  cat >> "$SLURM_CONF" <<CONF
PartitionName=low Nodes=node[1-$nodes] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-10} MaxTime=120
PartitionName=high Nodes=node[1-$nodes] PriorityTier=10 PreemptMode=OFF MaxTime=120
CONF
  # submitit calls sacct, which needs an accounting daemon; squeue knows ended jobs for MinJobAge seconds
  cat > "$folder/bin/sacct" <<'SACCT'
#!/usr/bin/env bash
ids=
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then ids=${ids:+$ids,}$2; shift; fi
  shift
done
echo 'JobID|State|NodeList'
for id in ${ids//,/ }; do squeue -h -t all -j "$id" -o '%i|%T|%N' 2>/dev/null || true; done
SACCT
  chmod +x "$folder/bin/sacct"
}

start_node() {
  unshare --uts --mount --propagation private bash -c \
    "mount --bind '$folder/hosts' /etc/hosts && hostname $1 && exec slurmd -f '$SLURM_CONF' -N $1"
}

# End the daemon of a node and all processes of the node, which are those in its UTS namespace.
kill_node() {
  local daemon space other
  daemon=$(cat "$folder/slurmd.$1.pid" 2>/dev/null) && space=$(readlink "/proc/$daemon/ns/uts") || return 0
  for other in /proc/[0-9]*; do
    if [ "$(readlink "$other/ns/uts" 2>/dev/null)" = "$space" ]; then kill -KILL "${other#/proc/}" 2>/dev/null || true; fi
  done
  rm -f "$folder/slurmd.$1.pid"
}

idle() { sinfo -h -N -p low -o '%N %T' 2>/dev/null | grep -c ' idle$' || true; }

wait_until_idle() {
  local end=$((SECONDS + 90))
  until [ "$(idle)" = "$nodes" ] || [ "$SECONDS" -ge "$end" ]; do sleep 0.1; done
  echo "$(idle) of $nodes nodes are idle"
  [ "$(idle)" = "$nodes" ]
}

case $action in
  up)
    write_configuration
    [ -s "$folder/munge/key" ] || (umask 077 && dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 status=none)
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" \
      --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" --seed-file="$folder/munge/seed"
    slurmctld -f "$SLURM_CONF"
    for ((n = 1; n <= nodes; n++)); do start_node "node$n"; done
    wait_until_idle
    ;;
  heal)
    nodes=$(grep -c ^NodeName= "$SLURM_CONF")
    sinfo -h -N -p low -o '%N %T' | while read -r node state; do
      [ "$state" = idle ] && continue
      echo "$node was $state: $(sinfo -h -n "$node" -o %E)"
      tail -n 5 "$folder/log/slurmd.$node.log"
      scontrol update "nodename=$node" state=down reason=heal  # makes the controller give up the node's jobs
      kill_node "$node"
      start_node "$node"
      scontrol update "nodename=$node" state=resume
    done
    wait_until_idle
    ;;
  down)
    scancel --signal=KILL --user "$(id -un)" 2>/dev/null || true
    scancel --user "$(id -un)" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do
      [ -z "$(squeue -h 2>/dev/null)" ] && break
      sleep 0.2
    done
    for file in "$folder"/slurmd.*.pid "$folder/slurmctld.pid" "$folder/munge/munged.pid"; do
      [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
    ;;
  *)
    sed -n '2,13p' "$0"
    exit 2
    ;;
esac
