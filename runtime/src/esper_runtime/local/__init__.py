"""`esper run`: the operator's pure core and a small kubelet, on one machine and without a cluster.

Read in this order: `manifest` (what the user gave), `state` (what is kept between commands), `volumes` and `process`
(what a pod is made of here), `pod` (one pod), `jobs` (the Job controller), `bus` (Redis, reports, signals), `runner`
(observe, decide, carry out, write the status). Training knows nothing of it: the same commands run as in a pod.
"""
