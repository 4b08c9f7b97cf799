"""Operations of QLoRA training. Needs torch only; knows no model and no job."""
