//! The mesh's demo CA, and SPIFFE identities.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// The trust domain of every identity here.
pub const TRUST_DOMAIN: &str = "cluster.local";

const CA_FILE: &str = "ca.pem";
/// Clocks of test machines may differ a little.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
const LEAF_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// Who a workload is in the mesh: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's service account.
    pub service_account: String,
}

impl Identity {
    /// The identity of `service_account` in `namespace`.
    pub fn new(namespace: impl Into<String>, service_account: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), service_account: service_account.into() }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}", self.namespace, self.service_account)
    }
}

impl FromStr for Identity {
    type Err = anyhow::Error;

    /// Reads a SPIFFE URI of this trust domain, or `<namespace>/<service account>`.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let parts = match text.strip_prefix("spiffe://") {
            Some(uri) => uri
                .strip_prefix(TRUST_DOMAIN)
                .and_then(|path| path.strip_prefix("/ns/"))
                .and_then(|path| path.split_once("/sa/")),
            None => text.split_once('/'),
        };
        match parts {
            Some((namespace, account))
                if [namespace, account].iter().all(|p| !p.is_empty() && !p.contains('/')) =>
            {
                Ok(Self::new(namespace, account))
            }
            _ => bail!(
                "read identity {text:?}: want spiffe://{TRUST_DOMAIN}/ns/NAMESPACE/sa/ACCOUNT \
                 or NAMESPACE/ACCOUNT"
            ),
        }
    }
}

/// A certificate authority that all proxies and clients of one demo share through a directory.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").finish_non_exhaustive()
    }
}

/// A workload's certificate and its key.
#[derive(Debug)]
pub struct Leaf {
    /// The workload's certificate, then the CA's.
    pub chain: Vec<CertificateDer<'static>>,
    /// The workload's private key.
    pub key: PrivateKeyDer<'static>,
}

impl Ca {
    /// Opens the CA in `dir`; whoever comes first creates it, atomically, for its owner only.
    pub fn open(dir: &Path) -> anyhow::Result<Self> {
        let file = dir.join(CA_FILE);
        if !file.exists() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(dir)
                .with_context(|| format!("create CA directory {}", dir.display()))?;
            create(dir).with_context(|| format!("create CA {}", file.display()))?;
        }
        let pem = fs::read(&file).with_context(|| format!("read CA {}", file.display()))?;
        Self::from_pem(&pem).with_context(|| {
            format!("read CA {}: remove it and all processes that use it", file.display())
        })
    }

    fn from_pem(pem: &[u8]) -> anyhow::Result<Self> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem).context("find the private key")?;
        let root = CertificateDer::from_pem_slice(pem).context("find the certificate")?;
        let key = KeyPair::try_from(&key).context("read the private key")?;
        // The issuer's name is fixed and its key id follows from the key, so nothing of the
        // certificate has to be parsed.
        Ok(Self { issuer: Issuer::new(ca_params(), key), root })
    }

    /// The root certificate.
    pub fn root(&self) -> CertificateDer<'static> {
        self.root.clone()
    }

    /// Issues a certificate for `identity`, good as a client and as a server.
    pub fn issue(&self, identity: &Identity) -> anyhow::Result<Leaf> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (SystemTime::now() - CLOCK_SKEW).into();
        params.not_after = (SystemTime::now() + LEAF_LIFETIME).into();
        let uri = identity.to_string();
        let uri = uri.try_into().map_err(|_| anyhow!("identity {identity} is not ASCII"))?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let cert = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("issue certificate for {identity}"))?;
        Ok(Leaf {
            chain: vec![cert.der().clone(), self.root.clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        })
    }
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "redirect stand-in mesh CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn create(dir: &Path) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    let cert = ca_params().self_signed(&key)?;
    let draft = dir.join(format!(".{CA_FILE}.{}.{:?}", std::process::id(), nix::unistd::gettid()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    let written = file
        .write_all(format!("{}{}", key.serialize_pem(), cert.pem()).as_bytes())
        .and_then(|()| file.sync_all())
        // A link, not a rename: the first one wins and nobody's CA changes under them.
        .and_then(|()| match fs::hard_link(&draft, dir.join(CA_FILE)) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        });
    fs::remove_file(&draft)?;
    Ok(written?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_identity_is_read_and_written_as_a_spiffe_uri() {
        let identity = Identity::new("shop", "cart");
        assert_eq!(identity.to_string(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(identity.to_string().parse::<Identity>().unwrap(), identity);
        assert_eq!("shop/cart".parse::<Identity>().unwrap(), identity);
        for bad in [
            "",
            "shop",
            "shop/",
            "/cart",
            "a/b/c",
            "spiffe://other/ns/shop/sa/cart",
            "spiffe://cluster.local/ns/shop",
            "spiffe://cluster.local.evil/ns/shop/sa/cart",
            "spiffe://cluster.local/ns/shop/sa/cart/x",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn many_proxies_that_start_at_once_share_one_ca() {
        let dir = std::env::temp_dir().join(format!("redirect-ca-{}", std::process::id()));
        let roots: Vec<_> = std::thread::scope(|scope| {
            let open = || scope.spawn(|| Ca::open(&dir).unwrap().root());
            let threads: Vec<_> = (0..8).map(|_| open()).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let files: Vec<_> = fs::read_dir(&dir).unwrap().map(|f| f.unwrap()).collect();
        let modes: Vec<_> =
            files.iter().map(|f| f.metadata().unwrap().permissions().mode() & 0o777).collect();
        fs::remove_dir_all(&dir).unwrap();
        assert!(roots.windows(2).all(|pair| pair[0] == pair[1]));
        assert_eq!(modes, [0o600], "drafts left behind or readable by others: {files:?}");
    }
}
