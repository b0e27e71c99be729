"""Rewards by name. Yours is named by its path: `rewards: {"my_rewards.py:redness": 1.0}` or `package.module:name`."""

REWARDS = {
    "scene_match": "flowalign.rewards.scene:scene_match",
    "scene_match_graded": "flowalign.rewards.scene:scene_match_graded",
    "jpeg_size": "flowalign.rewards.pictures:jpeg_size",
    "brightness": "flowalign.rewards.pictures:brightness",
    "clip_score": "flowalign.rewards.clip:ClipScore",
}
"""Names to places, imported when asked for."""
