"""A CUDA device that is not there: tensors of the CPU that pass for CUDA ones.

``install`` (``twin.py``) makes the process one in which ``torch.cuda`` has a device. What is moved
or made there is a tensor of the CPU whose storage is noted (``placement``), so that its values and
gradients are real, and everything around them is looked at on the way:

- an operator on tensors of both devices raises, as it does on CUDA (``dispatch``, ``transfers``);
- launches, moments at which the host waits, copies between the devices and casts are counted by
  call site (``counts``);
- what CUDA has and the CPU has not is computed, with CUDA's own checks of its arguments: products
  of 16-bit operands with a float32 result (``products``), attention over ragged sequences
  (``varlen``);
- Triton kernels run in Triton's interpreter, and refuse tensors of the CPU (``triton_runs``);
- ``torch.cuda`` and autocast answer for the device (``runtime``).

It is a twin in what is asked of the device, not in time or memory. It does not see races, streams
that overlap, alignment, the order of sums in cuBLAS, or the kernels of flash-attn and bitsandbytes,
and it has no CUDA graphs: what records steps has to run without.

The process is changed for good, so tests use processes of their own (``process``), each with a
script of several scenarios.
"""
