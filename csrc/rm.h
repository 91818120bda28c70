/*
 * What the monitor must know of the driver's ABI: how an RM control reaches it. Which controls matter is in the
 * control table that the supervisor sends. Sources: nvos.h, nv-ioctl.h, nv-ioctl-numbers.h and nv.c of
 * NVIDIA/open-gpu-kernel-modules.
 */
#ifndef MPU_RM_H
#define MPU_RM_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

/* The driver looks at the number and the size of an ioctl and at nothing else (nv.c, nvidia_ioctl). */
#define RM_IOCTL_MASK 0x3FFF00FFu
#define RM_CONTROL_WANT 0x0020002Au /* NV_ESC_RM_CONTROL with NVOS54 */
#define RM_XFER_WANT 0x001000D3u    /* NV_ESC_IOCTL_XFER_CMD with nv_ioctl_xfer_t */
#define RM_CONTROL_IOCTL 0xC020462Au
#define RM_CONTROL_NR 0x2Au

struct nvos54 {
    uint32_t client;
    uint32_t object;
    uint32_t cmd;
    uint32_t flags;
    uint64_t params;
    uint32_t params_size;
    uint32_t status;
};
static_assert(sizeof(struct nvos54) == 32 && offsetof(struct nvos54, params) == 16, "NVOS54_PARAMETERS");

struct nv_xfer {
    uint32_t cmd;
    uint32_t size;
    uint64_t ptr;
};
static_assert(sizeof(struct nv_xfer) == 16, "nv_ioctl_xfer_t");

#endif
