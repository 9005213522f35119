"""Exports of a student: a stock diffusers folder, a LoRA file, a model card, a ComfyUI workflow. It may import `models`, `rewards` and the rooms
below these.
"""

from instep.export.card import ExportInfo
from instep.export.folder import ExportReport, export_many_step, export_student
from instep.export.lora import lora_state_dict, save_loras
from instep.export.parts import export_parts
from instep.export.scheduler import few_step_scheduler
from instep.export.verify import verify_export

__all__ = [
    "ExportInfo",
    "ExportReport",
    "export_many_step",
    "export_parts",
    "export_student",
    "few_step_scheduler",
    "lora_state_dict",
    "save_loras",
    "verify_export",
]
