#!/usr/bin/env bash
# A real SLURM of this machine alone, in a directory of its own: single_node_slurm.sh start|stop DIR
# Needs munged, slurmctld and slurmd (Debian: munge, slurmctld, slurmd, slurm-client), as root.
# Then: SLURM_CONF=DIR/slurm.conf sbatch ...
set -eu
dir=$2
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin

if [ "$1" = stop ]; then
  for name in slurmd slurmctld munged; do
    [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
  done
  exit 0
fi

for program in munged slurmctld slurmd sbatch srun; do
  command -v $program >/dev/null || { echo "$program is not installed"; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "slurmd has to be root"; exit 1; }

mkdir -p "$dir/state" "$dir/spool"
port=$((20000 + $$ % 20000 / 2 * 2))
host=$(hostname -s)
# A requeued job waits until its credentials are gone: seconds, instead of two minutes.
cat > "$SLURM_CONF" <<EOF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$dir/munge.socket,cred_expire=5
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
(umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
  --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>/dev/null
slurmctld -c
slurmd -c
for _ in $(seq 100); do
  sinfo --noheader --format=%t 2>/dev/null | grep -q idle && exit 0
  sleep 0.2
done
echo "the node did not come up; see $dir/*.log"
exit 1
