"""Formats: what a policy can be exported as, a file each.

The entry of genpolicy/formats/NAME.py is a function called NAME:

    NAME(found, out, *, data, task, instruction) -> the text that `genpolicy export` prints

found: the policy (`genpolicy.policy.files.Saved`), with the sampler that is asked for. out: the
folder to write, which appears whole or not at all (`_folder.fresh`). data: the recorded episodes
that it learned from (`Dataset`), task: what it was trained to do (`ControlTask`); None where they
are not known. instruction: what a policy that reads words is to do (--instruction); None where it
was not given. A format that can be written in several takes ``precision`` (--precision), too:
"fp32", its default, or "fp16". It raises `ConfigError` with one sentence for a policy that it can't
hold.
"""
