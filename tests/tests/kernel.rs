//! The program in the kernel: it loads, its maps take what user space writes, it lets pass what is nobody's.

use komainu_packet::lane::kernel::program::{Hook, Kernel, Sizes};

#[test]
fn both_programs_load_and_let_everything_pass_without_a_plan() {
    for (hook, passes) in [(Hook::Xdp, 2), (Hook::Tc, u32::MAX)] {
        let kernel = Kernel::load(hook, Sizes::default()).unwrap();
        let frame = [0u8; 64];
        let ran = kernel.test_run(&frame, None, 1).unwrap();
        assert_eq!((ran.action, &ran.frame[..]), (passes, &frame[..]), "{hook:?}");
    }
}
