"""Objectives by name, imported when they are used.

Your own is named by its path: `objective: {name: "mine.py:Mine"}`.
"""

OBJECTIVES = {
    "flow_grpo": "flowalign.objectives.flow_grpo:FlowGRPO",
    "ddpo": "flowalign.objectives.ddpo:DDPO",
    "d3po": "flowalign.objectives.d3po:D3PO",
    "crd": "flowalign.objectives.crd:CRD",
    "nft": "flowalign.objectives.nft:NFT",
    "awm": "flowalign.objectives.awm:AWM",
    "dgpo": "flowalign.objectives.dgpo:DGPO",
    "rwr": "flowalign.objectives.rwr:RWR",
    "dpo": "flowalign.objectives.dpo:DPO",
    "kto": "flowalign.objectives.kto:KTO",
    "prdp": "flowalign.objectives.prdp:PRDP",
    "alignprop": "flowalign.objectives.alignprop:AlignProp",
    "draft_lv": "flowalign.objectives.draft_lv:DRaFTLV",
    "refl": "flowalign.objectives.refl:ReFL",
    "opsd": "flowalign.objectives.opsd:OPSD",
    "sft": "flowalign.objectives.sft:SFT",
    "raft": "flowalign.objectives.raft:RAFT",
    "soar": "flowalign.objectives.soar:SOAR",
}
"""From the name in a YAML file to the place of the class."""
