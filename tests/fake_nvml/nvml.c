/* A driver library for tests: the few NVML entry points that a provider asks, with the defects of real ones.
 *
 *   -DDEVICES=n        how many GPUs it shows
 *   -DOLD_DRIVER       lacks the newer symbols (compute capability, MIG), as old libraries do
 *   -DUNIFIED_MEMORY   memory and MIG are "not supported", as on integrated GPUs
 *   -DLOST_GPU         the second GPU has fallen off the bus
 *   -DMIG_ENABLED      the first GPU is partitioned
 *   -DNO_DRIVER        the library is there, the driver is not loaded
 */
#include <stdio.h>
#include <string.h>

#ifndef DEVICES
#define DEVICES 1
#endif

enum { SUCCESS = 0, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };

typedef struct { unsigned long long total, free, used; } memory_t;
static int devices[DEVICES > 0 ? DEVICES : 1];

static int at(void *device) { return (int)((int *)device - devices); }

int nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
#ifdef NO_DRIVER
    return DRIVER_NOT_LOADED;
#else
    return SUCCESS;
#endif
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    snprintf(version, length, "999.01");
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = DEVICES;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
#ifdef LOST_GPU
    if (index == 1) return GPU_IS_LOST;
#endif
    *device = &devices[index];
    return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *name, unsigned int length) {
    snprintf(name, length, at(device) == 0 ? "NVIDIA Test 9000" : "Test 100");
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
    snprintf(uuid, length, "GPU-0000-%d", at(device));
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    (void)device;
#ifdef UNIFIED_MEMORY
    (void)memory;
    return NOT_SUPPORTED;
#else
    memory->total = 24ull << 30;
    memory->free = memory->used = 0;
    return SUCCESS;
#endif
}
#ifndef OLD_DRIVER
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    (void)device;
    *major = 9;
    *minor = 0;
    return SUCCESS;
}
int nvmlDeviceGetMigMode(void *device, unsigned int *current, unsigned int *pending) {
#ifdef UNIFIED_MEMORY
    (void)device, (void)current, (void)pending;
    return NOT_SUPPORTED;
#else
    *current = *pending = 0;
#ifdef MIG_ENABLED
    *current = at(device) == 0;
#endif
    return SUCCESS;
#endif
}
#endif
