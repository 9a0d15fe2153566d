//! What `/proc` says about processes, which containers may influence.

use std::path::Path;

use procfs::{FromRead as _, ProcessCGroups, process::MountInfos};

use super::{fuzz, text};
use crate::{
    cgroup::{Cgroup, path_in},
    finder::{inode_of, pod_of},
};

const UID: &str = "0d3a8f6e-5b1c-4c53-9c5f-0a1b2c3d4e5f";

const CGROUPS: [&str; 8] = [
    "0::/kubepods/besteffort/pod0d3a8f6e-5b1c-4c53-9c5f-0a1b2c3d4e5f/1f2e3d4c5b6a\n",
    "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0d3a8f6e_5b1c_4c53_9c5f_0a1b2c3d4e5f.slice/cri-containerd-1f2e.scope\n",
    "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod0123456789abcdef0123456789abcdef.slice/crio-1f2e.scope/container\n",
    "11:rdma:/\n10:pids:/kubepods/burstable/pod0d3a8f6e-5b1c-4c53-9c5f-0a1b2c3d4e5f/1f2e\n0::/\n",
    "4:memory:/system.slice/containerd.service/kubepods-besteffort-pod0d3a8f6e_5b1c_4c53_9c5f_0a1b2c3d4e5f.slice:cri-containerd:1f2e\n",
    "0::/../../besteffort/pod0d3a8f6e-5b1c-4c53-9c5f-0a1b2c3d4e5f/1f2e\n",
    "0::/system.slice/kubelet.service\n",
    "0::/user.slice/my-pod0123456789abcdef0123456789abcdef.slice\n",
];

#[test]
fn cgroups_tell_a_uid_that_is_in_them_or_none() {
    fuzz!(&CGROUPS, |bytes| {
        let cgroups = text(bytes);
        if let Some(uid) = pod_of(&cgroups) {
            assert!(matches!(uid.len(), 32 | 36), "{uid}");
            assert!(uid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()), "{uid}");
            assert!(cgroups.replace('_', "-").contains(&format!("pod{uid}")), "{uid}");
        }
        // A container may make cgroups below its own, with any name but of several lines.
        let below = cgroups.replace('\n', "");
        let systemd = UID.replace('-', "_");
        for own in [
            format!("0::/kubepods/pod{UID}/container/{below}"),
            format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-1.scope/{below}"),
            format!("5:pids:/kubepods/pod{UID}/{below}\n0::/{below}"),
        ] {
            assert_eq!(pod_of(&own).as_deref(), Some(UID), "{own}");
        }
    });
}

const LINKS: [&str; 3] = ["net:[4026531840]", "net:[4294967296]", "mnt:[4026531841]"];

#[test]
fn inode_of_a_link_is_the_number_in_it() {
    fuzz!(&LINKS, |bytes| {
        let link = text(bytes);
        if let Some(inode) = inode_of(Path::new(&*link)) {
            let number = link.trim_start_matches("net:[").trim_end_matches(']');
            assert_eq!(number.parse(), Ok(inode), "{link}");
        }
    });
}

/// `/proc/PID/cgroup`, an empty line, and `/proc/PID/mountinfo`.
const MOUNTS: [&str; 4] = [
    "0::/system.slice/kubelet.service\n\n30 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    "0::/../pod1/ztunnel\n\n1700 1699 0:26 /../pod1/ztunnel /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw\n1701 1699 8:1 / / rw - ext4 /dev/sda1 rw\n",
    "11:rdma:/\n10:pids:/kubepods\n0::/a\n\n31 23 0:27 /a /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
    "0::/a/b\n\n30 23 0:26 /a /mnt/x\\040y rw master:1 propagate_from:2 - cgroup2 none rw\n",
];

#[test]
fn cgroup_of_a_process_is_below_its_root() {
    fuzz!(&MOUNTS, |bytes| {
        let end = bytes.windows(2).position(|pair| pair == b"\n\n").unwrap_or(bytes.len());
        let (cgroups, mounts) = bytes.split_at(end);
        let mounts = MountInfos::from_read(mounts.strip_prefix(b"\n\n").unwrap_or(mounts));
        let path = ProcessCGroups::from_read(cgroups).ok().map(path_in);
        let (Ok(mounts), Some(Ok(path))) = (mounts, path) else { return };
        match Cgroup::at(path.clone(), 42, &mounts) {
            Ok(cgroup) => {
                assert_eq!(cgroup.path, path);
                let below = cgroup.dir.strip_prefix("/proc/42/root").unwrap();
                assert!(below.is_relative());
                // Nothing leads up except a mount point that the kernel would not show.
                let is_up = |path: &Path| path.components().any(|part| part.as_os_str() == "..");
                assert!(!is_up(below) || mounts.iter().any(|mount| is_up(&mount.mount_point)));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    });
}
