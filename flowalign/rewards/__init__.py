"""The built-in rewards by name.

A reward of your own is named by its path, `rewards: {"my_rewards.py:redness": 1.0}`, or by
`package.module:name`.
"""

# Places and not imports: each family needs another library that is slow to import.
REWARDS = {
    "scene_match": "flowalign.rewards.scene:scene_match",
    "scene_match_graded": "flowalign.rewards.scene:scene_match_graded",
    "clip_score": "flowalign.rewards.clip:ClipScore",
    "pick_score": "flowalign.rewards.clip:PickScore",
    "hps": "flowalign.rewards.clip:HPSv2",
    "aesthetic": "flowalign.rewards.clip:Aesthetic",
    "clip_image": "flowalign.rewards.clip:ClipImage",
    "taste": "flowalign.rewards.taste:Taste",
    "image_reward": "flowalign.rewards.blip:ImageReward",
    "ocr": "flowalign.rewards.ocr:OCR",
    "geneval": "flowalign.rewards.geneval:GenEval",
    "geneval_graded": "flowalign.rewards.geneval:GenEvalGraded",
    "vqa_score": "flowalign.rewards.vlm.local:LocalVqaScore",
    "reward_dance": "flowalign.rewards.vlm.local:LocalRewardDance",
    "prompt_echo": "flowalign.rewards.vlm.local:PromptEcho",
    "rubric": "flowalign.rewards.vlm.local:LocalRubric",
    "vqa_score_server": "flowalign.rewards.vlm.server:ServerVqaScore",
    "reward_dance_server": "flowalign.rewards.vlm.server:ServerRewardDance",
    "rubric_server": "flowalign.rewards.vlm.server:ServerRubric",
    "jpeg_size": "flowalign.rewards.pixel_statistics:jpeg_size",
    # Flow-GRPO's name for the size in kilobytes.
    "jpeg_incompressibility": "flowalign.rewards.pixel_statistics:jpeg_size",
    "jpeg_compressibility": "flowalign.rewards.pixel_statistics:jpeg_compressibility",
    "brightness": "flowalign.rewards.pixel_statistics:brightness",
    "contrast": "flowalign.rewards.pixel_statistics:contrast",
    "saturation": "flowalign.rewards.pixel_statistics:saturation",
    "colorfulness": "flowalign.rewards.pixel_statistics:colorfulness",
    "sharpness": "flowalign.rewards.pixel_statistics:sharpness",
    "adversarial": "flowalign.rewards.adversarial:Adversarial",
    "feature_distance": "flowalign.rewards.distribution:FeatureDistance",
    "vendi": "flowalign.rewards.distribution:Vendi",
}
"""Names and where they are defined. A reward is imported when a run uses it."""
