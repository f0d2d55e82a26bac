/* SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0 */
/*
 * The Internet checksum, as `src/checksum.rs` has it: RFC 1071, and RFC 1624 equation 3 for changes. Words are taken as they stand
 * in memory: the sum comes out in the same order (RFC 1071 §2 (B)).
 */
#ifndef KOMAINU_CHECKSUM_H
#define KOMAINU_CHECKSUM_H

#include "helpers.h"

/* Folded to 16 bits, not inverted. */
INLINE u16 sum_fold(u64 sum)
{
    sum = (sum & 0xffffffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    return (u16)sum;
}

/* What a changed field does to a sum that covers it. */
INLINE u64 delta16(u16 old, u16 new)
{
    return (u64)(u16)~old + new;
}

INLINE u64 delta32(u32 old, u32 new)
{
    return (u64)(u32)~old + new;
}

/* The new value of a checksum field. */
INLINE u16 delta_apply(u16 field, u64 delta)
{
    return (u16)~sum_fold((u64)(u16)~field + delta);
}

#endif
