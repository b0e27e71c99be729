"""Objectives by name. Yours is named by its path: `objective: {name: "mine.py:Mine"}`."""

from flowalign.objectives.flow_grpo import FlowGRPO

OBJECTIVES = {"flow_grpo": FlowGRPO}
