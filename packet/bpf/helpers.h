/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * What the compiler and the kernel's UAPI headers leave out: the helpers that are called, by their numbers in <linux/bpf.h>,
 * and the macros by which maps are described for the loader (BTF-defined maps).
 *
 * Written out here, so that building needs clang and nothing else.
 */
#ifndef KOMAINU_HELPERS_H
#define KOMAINU_HELPERS_H

#include <linux/types.h>
#include <linux/bpf.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s64 s64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static __attribute__((always_inline)) inline
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Fields of a map's description. */
#define UINT(name, value) int (*name)[value]
#define TYPE(name, type) type *name
#define INNER(name, type) type *name[]

/* The fields of network packets are big-endian; BPF runs in the processor's order. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define swap16(x) ((u16)__builtin_bswap16(x))
#define swap32(x) __builtin_bswap32(x)
#else
#error "Ethernet addresses are kept in the low bytes of 64-bit words: little-endian processors only"
#endif

/* Read or written once, whatever the compiler thinks of it. */
#define READ_ONCE(x) (*(const volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile __typeof__(x) *)&(x) = (value))
/* Keeps the compiler from reckoning with what it knew of a value. */
#define OPAQUE(x) asm volatile("" : "+r"(x))

static void *(*const map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static void *(*const ring_reserve)(void *ring, u64 size, u64 flags) = (void *)BPF_FUNC_ringbuf_reserve;
static void (*const ring_submit)(void *data, u64 flags) = (void *)BPF_FUNC_ringbuf_submit;
static void (*const ring_discard)(void *data, u64 flags) = (void *)BPF_FUNC_ringbuf_discard;
static u64 (*const boot_ns)(void) = (void *)BPF_FUNC_ktime_get_boot_ns;
static u64 (*const jiffies)(void) = (void *)BPF_FUNC_jiffies64;
static u32 (*const cpu_id)(void) = (void *)BPF_FUNC_get_smp_processor_id;
static long (*const redirect)(u32 ifindex, u64 flags) = (void *)BPF_FUNC_redirect;
#ifdef KOMAINU_XDP
static long (*const xdp_adjust_tail)(struct xdp_md *ctx, int delta) = (void *)BPF_FUNC_xdp_adjust_tail;
static u64 (*const xdp_buff_len)(struct xdp_md *ctx) = (void *)BPF_FUNC_xdp_get_buff_len;
#else
static long (*const skb_pull)(struct __sk_buff *skb, u32 len) = (void *)BPF_FUNC_skb_pull_data;
static long (*const skb_change_tail)(struct __sk_buff *skb, u32 len, u64 flags) = (void *)BPF_FUNC_skb_change_tail;
static long (*const skb_store)(struct __sk_buff *skb, u32 at, const void *from, u32 len, u64 flags) =
    (void *)BPF_FUNC_skb_store_bytes;
static long (*const l4_csum_replace)(struct __sk_buff *skb, u32 at, u64 from, u64 to, u64 flags) =
    (void *)BPF_FUNC_l4_csum_replace;
static long (*const csum_update)(struct __sk_buff *skb, u32 csum) = (void *)BPF_FUNC_csum_update;
#endif

#endif
