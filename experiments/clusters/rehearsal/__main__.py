import os, sys, time, subprocess
from experiments.clusters.rehearsal import hosts, desk
from experiments.clusters.rehearsal.desk import *
from experiments.clusters.rehearsal.hosts import *
if "--inside" not in sys.argv:
    os.execvp("unshare",enter("desk",[*programs(),"+/tmp/cluster/out"],[sys.executable,"-m","experiments.clusters.rehearsal","--inside"]))
lab=Lab(); head=lab.start("head",10); w1=lab.start("worker-1",11); w2=lab.start("worker-2",12)
say("up")
write_yaml(head.address,[w1.address,w2.address])
print(YAML.read_text())
os.environ.update(ENVIRONMENT)
try:
    print(do("ray","get-auth-token","--generate"))
    print(do("ray","up","-y","--no-config-cache",str(YAML)))
    watch=Watch(head)
    try:
        wait_for("nodes", lambda: len(watch.alive)==3, 100)
    except Failed:
        subprocess.run("mkdir -p /tmp/cluster/out/logs; cp -rL /proc/%d/root/tmp/ray/session_2*/logs/. /tmp/cluster/out/logs"%head.init,shell=True); raise
    say("check")
    print(do("ray","exec",str(YAML),f"dpsink-tune check {STUDY} --address auto"))
    say("study")
    tunnel=subprocess.Popen(["ray","dashboard",str(YAML)],env=ENVIRONMENT)
    time.sleep(10)
    job=subprocess.Popen(["ray","job","submit","--address",DASHBOARD,"--","dpsink-tune","sweep",str(STUDY),"--address","auto"],env=ENVIRONMENT,stdin=subprocess.DEVNULL)
    job.wait(240)
    say("down")
    print(do("ray","down","-y",str(YAML)))
    say("end")
    print([ (h.name,h.processes()) for h in (head,w1,w2)])
except Failed as f:
    print(f); 
    if "--shell" in sys.argv: time.sleep(10000)
