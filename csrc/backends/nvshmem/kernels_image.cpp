// The machine code of kernels.cu, as bytes of this module: SIDP_KERNELS_FATBIN is the file that nvcc wrote.
asm(".section .rodata\n"
    ".global sidp_kernels_fatbin\n"
    ".hidden sidp_kernels_fatbin\n"
    ".balign 64\n"
    "sidp_kernels_fatbin:\n"
    ".incbin \"" SIDP_KERNELS_FATBIN
    "\"\n"
    ".previous\n");
