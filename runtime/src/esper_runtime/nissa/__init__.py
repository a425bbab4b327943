"""Nissa, the observer: alerts, recorded series, objectives and dashboards as data, and the files made of them.

Nothing here runs in a pod. scripts/generate writes the chart's rules and dashboards and the page of alerts from it;
names of metrics come from esper_leyline.metrics.
"""
