# `make` lists the targets.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
VERSION := $(shell sed -n 's/^appVersion: "\(.*\)"/\1/p' charts/esper/Chart.yaml)

.PHONY: help
help: ## This list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s/[$$][$$]/$$/g' | expand -t 20

.PHONY: setup
setup: ## Install everything into .venv
	@scripts/setup

.PHONY: demo
demo: setup ## Train, survive a NaN, and show what happened; no cluster needed (about three minutes)
	@.venv/bin/esper run examples/digits-nan.yaml --namespace demo --fresh

.PHONY: test
test: ## All tests that this machine can run
	@scripts/test

.PHONY: test-fast
test-fast: ## Unit, property, integration and repository tests
	@scripts/test fast

.PHONY: acceptance
acceptance: setup ## Every promised row and the tests that show it; writes docs/acceptance.md
	@scripts/acceptance

.PHONY: acceptance-breaks
acceptance-breaks: setup ## Break the code under each row and see its test fail; writes docs/acceptance-breaks.md
	@$(PYTHON) -m tests.acceptance.break_it --write docs/acceptance-breaks.md

.PHONY: check
check: setup ## Format, lint, types, layers, generated files, chart
	@scripts/check

.PHONY: generate
generate: setup ## Regenerate stubs, CRD and reference pages
	@scripts/generate

.PHONY: e2e
e2e: setup ## Cluster tests: on $$KUBECONFIG, else on a kind cluster
	@. scripts/cluster-env; $(PYTHON) -m pytest -x -v tests/e2e

.PHONY: apiserver
apiserver: setup ## Tests against a real kube-apiserver without nodes
	@. scripts/cluster-env; $(PYTHON) -m pytest -v tests/apiserver

.PHONY: bench
bench: setup ## Print the figures (nothing else should run meanwhile)
	@scripts/bench

.PHONY: faults
faults: setup ## Long fault campaigns, MINUTES=10 of them; the next call goes on where this one stopped
	@$(PYTHON) -m tests.faults --minutes $(or $(MINUTES),10) $(if $(ONLY),--only $(ONLY))

.PHONY: drills
drills: setup ## Real faults in real runs, and the alerts that tell of them; writes docs/drills.md, DRILL=name plays one
	@. scripts/prometheus-env; $(PYTHON) -m tests.drills $(if $(DRILL),$(DRILL),--write docs/drills.md)

.PHONY: images
images: ## Build the images under the names that the chart expects
	@. scripts/cluster-env; scripts/images $(VERSION)

.PHONY: load
load: images ## Put the images on the nodes of a kind cluster ($$KIND_CLUSTER_NAME, else "kind")
	@. scripts/cluster-env; kind load docker-image $(foreach name,operator sidecar runtime,esper/$(name):$(VERSION))

.PHONY: clean
clean: ## Remove caches and local runs
	rm -rf .esper .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis e2e-artifacts
