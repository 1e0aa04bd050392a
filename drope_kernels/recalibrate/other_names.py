"""What other trainers call the fields of a `RunConfig`, for hints."""

from __future__ import annotations

OTHER_NAMES = {
    "model": "model_name_or_path model_name model_path base_model pretrained checkpoint m",
    "data": "dataset datasets train_data train_file train_files data_path data_dir text corpus d",
    "output_dir": "out output out_dir save_dir output_path o",
    "context_length": "seq_len seq_length max_seq_length max_seq_len max_length block_size "
    "sequence_length context_len ctx_len n_ctx length",
    "tokens": "max_tokens num_tokens train_tokens total_tokens token_budget budget "
    "epochs num_epochs num_train_epochs",
    "steps": "max_steps num_steps train_steps num_train_steps total_steps iters max_iters",
    "batch_size": "per_device_train_batch_size train_batch_size micro_batch_size bs b",
    "gradient_accumulation": "gradient_accumulation_steps grad_accum accumulation_steps",
    "sequences_per_step": "global_batch_size total_batch_size effective_batch_size",
    "learning_rate": "lr max_lr peak_lr",
    "schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "warmup": "warmup_steps warmup_ratio num_warmup_steps",
    "min_lr_ratio": "min_lr min_learning_rate",
    "weight_decay": "wd",
    "adam_betas": "betas adam_beta1 adam_beta2 beta1 beta2",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping gradient_clip_val",
    "dtype": "torch_dtype precision weights_dtype",
    "bf16": "fp16 mixed_precision amp",
    "activation_checkpointing": "gradient_checkpointing grad_checkpointing",
    "sharded": "fsdp deepspeed zero",
    "cpu": "use_cpu no_cuda",
    "validation_data": "eval_data eval_file validation_file val_data test_data",
    "validation_share": "val_size eval_split validation_split val_fraction test_size",
    "text_column": "text_key text_field dataset_text_field column field key",
    "log_steps": "logging_steps log_every log_interval",
    "eval_steps": "eval_every eval_interval evaluation_steps",
    "save_steps": "save_every save_interval checkpoint_steps",
    "keep_checkpoints": "save_total_limit",
    "resume": "resume_from_checkpoint",
    "attention": "attn_implementation attn",
    "qk_norm": "qknorm",
    "drop": "drop_layers layers",
}
