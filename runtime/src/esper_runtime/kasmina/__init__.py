"""The Kasmina sidecar: nothing that Tamiyo commands happens unless it is authentic, for this run, fresh and new.

`verifier` holds the rules (pure, with an injected clock), `service` the gRPC server on `<run dir>/kasmina.sock`,
`worker` the process. The trainer asks it twice per epoch boundary; nobody else talks to it. It touches no tensor.
"""
