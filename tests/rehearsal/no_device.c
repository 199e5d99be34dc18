/* Loaded before torch (LD_PRELOAD), under the name of NVIDIA's driver: what torch asks a driver while it computes on
 * tensors without memory. A machine with a real driver is told the same, so nothing ever reaches a card.
 *
 * c10::cuda::device_count   how many devices there are: none while torch sets itself up, then as many as it may ask for
 * cuDevicePrimaryCtxGetState   whether one is in use: never, so autograd looks for no streams */

static int count = 0;

void set_device_count(int wanted) { count = wanted; }

signed char _ZN3c104cuda12device_countEv(void) { return (signed char)count; }

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    (void)device;
    *flags = 0;
    *active = 0;
    return 0;
}
