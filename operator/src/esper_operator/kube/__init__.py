"""Everything that talks to the API server: the protocol, its client, informers, the Lease, Events and errors."""
