// void drope_emulation_switch(void** save, void* load): the callee-saved registers of the System V
// ABI go onto the old stack and come from the new one. Control words are never changed here.
  .text
  .globl drope_emulation_switch
  .type drope_emulation_switch, @function
drope_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size drope_emulation_switch, . - drope_emulation_switch
  .section .note.GNU-stack, "", @progbits
