// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Errors} from "@openzeppelin/contracts/interfaces/draft-IERC6093.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {EntryGate} from "../src/entry/EntryGate.sol";
import {PaymentChannels} from "../src/PaymentChannels.sol";
import {StakeRegistry} from "../src/StakeRegistry.sol";
import {Base} from "./Base.sol";
import {
    BlacklistToken,
    FalseToken,
    FeeToken,
    LyingToken,
    NoReturnToken,
    ReentrantToken,
    RebasingToken
} from "./HostileTokens.sol";

/// A token reverts what it spoils, or harms only whoever it names: PaymentChannels.
contract ChannelsHostileTokenTest is Base {
    uint256 private constant SIGNER_KEY = 0xA11CE;
    uint40 private constant WINDOW = 600;
    uint40 private constant FAR = 1e12;
    address private constant PAYEE = address(0xB0B);
    address private signer;

    function setUp() public {
        vm.warp(1_000_000);
        signer = vm.addr(SIGNER_KEY);
    }

    function _channels(address token) private returns (PaymentChannels channels) {
        channels = new PaymentChannels(IERC20(token), WINDOW, address(0), 0, 0);
        IERC20(token).approve(address(channels), type(uint256).max);
    }

    function _voucher(PaymentChannels channels, bytes32 id, uint96 amount) private view returns (bytes memory) {
        return _signature(SIGNER_KEY, channels.voucherDigest(id, amount));
    }

    function _claim(PaymentChannels channels, bytes32 id, uint96 amount)
        private
        view
        returns (PaymentChannels.Claim[] memory claims)
    {
        (bytes32 r, bytes32 vs) = _compact(SIGNER_KEY, channels.voucherDigest(id, amount));
        claims = new PaymentChannels.Claim[](1);
        claims[0] = PaymentChannels.Claim(id, amount, r, vs);
    }

    function test_fee_on_transfer_token_cannot_come_in() public {
        PaymentChannels channels = _channels(address(new FeeToken()));
        vm.expectRevert(abi.encodeWithSelector(EntryGate.UnexpectedDeposit.selector, 1000, 990));
        channels.open(PAYEE, signer, 1000, FAR);
    }

    function test_lying_token_cannot_come_in() public {
        PaymentChannels channels = _channels(address(new LyingToken()));
        vm.expectRevert(abi.encodeWithSelector(EntryGate.UnexpectedDeposit.selector, 1000, 0));
        channels.open(PAYEE, signer, 1000, FAR);
    }

    function test_false_returning_token_reverts_and_the_claim_is_kept() public {
        FalseToken token = new FalseToken();
        PaymentChannels channels = _channels(address(token));
        bytes32 id = channels.open(PAYEE, signer, 1000, FAR);
        token.arm(true);
        bytes memory failed = abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(token));
        vm.expectRevert(failed);
        channels.open(PAYEE, signer, 1000, FAR);
        bytes memory voucher = _voucher(channels, id, 400);
        vm.expectRevert(failed);
        channels.redeem(id, 400, voucher);
        _eq(channels.channel(id).claimed, 0, "claimed although unpaid");
        token.arm(false);
        channels.redeem(id, 400, voucher);
        _eq(token.balanceOf(PAYEE), 400, "paid later");
    }

    function test_token_that_returns_nothing_works() public {
        NoReturnToken token = new NoReturnToken();
        PaymentChannels channels = new PaymentChannels(IERC20(address(token)), WINDOW, address(0), 0, 0);
        token.approve(address(channels), type(uint256).max);
        bytes32 id = channels.open(PAYEE, signer, 1000, FAR);
        channels.redeem(id, 400, _voucher(channels, id, 400));
        channels.requestClose(id);
        vm.warp(block.timestamp + WINDOW);
        channels.close(id);
        _eq(token.balanceOf(PAYEE), 400, "payee");
        _eq(token.balanceOf(address(channels)), 0, "left behind");
    }

    function test_reentrant_token_cannot_reenter_any_function_that_moves_tokens() public {
        ReentrantToken token = new ReentrantToken();
        PaymentChannels channels = _channels(address(token));
        bytes32 id = channels.channelId(address(this), PAYEE, 0);
        bytes memory signature = _voucher(channels, id, 10);
        bytes[6] memory calls = [
            abi.encodeCall(channels.open, (PAYEE, signer, 1, FAR)),
            abi.encodeCall(channels.topUp, (id, 1, FAR)),
            abi.encodeCall(channels.redeem, (id, 10, signature)),
            abi.encodeCall(channels.cooperativeClose, (id, 10, signature)),
            abi.encodeCall(channels.close, (id)),
            abi.encodeCall(channels.withdraw, (PAYEE))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            token.arm(address(channels), calls[i]);
            channels.open(PAYEE, signer, 1000, FAR);
            _true(!token.succeeded(), "reentered");
            bytes4 reason = bytes4(token.answer());
            _true(reason == ReentrancyGuardTransient.ReentrancyGuardReentrantCall.selector, "not the guard");
        }
        _eq(token.balanceOf(address(channels)), 6000, "deposits");
    }

    /// redeemMany and push move no tokens and take no guard: entered from inside a payout they find it booked already.
    function test_reentrant_token_gains_nothing_by_claiming_again_inside_a_payout() public {
        ReentrantToken token = new ReentrantToken();
        PaymentChannels channels = _channels(address(token));
        bytes32 id = channels.open(PAYEE, signer, 1000, FAR);
        bytes memory voucher = _voucher(channels, id, 400);
        token.arm(address(channels), abi.encodeCall(channels.redeemMany, (_claim(channels, id, 400))));
        channels.redeem(id, 400, voucher);
        _true(token.succeeded(), "redeemMany takes no guard");
        _eq(channels.credited(PAYEE), 0, "paid twice");
        _eq(token.balanceOf(PAYEE), 400, "paid once");
        // Inside a top-up the deposit is booked before it arrives; were it not to arrive, all of it would revert.
        token.arm(address(channels), abi.encodeCall(channels.redeemMany, (_claim(channels, id, 1500))));
        channels.topUp(id, 500, FAR);
        _eq(channels.credited(PAYEE), 1100, "credited");
        _eq(token.balanceOf(address(channels)), 1100, "covered");
    }

    function test_blacklisted_payee_harms_only_itself_and_can_withdraw_elsewhere() public {
        BlacklistToken token = new BlacklistToken();
        PaymentChannels channels = _channels(address(token));
        bytes32 id = channels.open(PAYEE, signer, 1000, FAR);
        bytes32 second = channels.open(address(0xCAFE), signer, 1000, FAR);
        token.refuse(PAYEE);
        PaymentChannels.Claim[] memory claims = new PaymentChannels.Claim[](2);
        claims[0] = _claim(channels, id, 600)[0];
        claims[1] = _claim(channels, second, 500)[0];
        channels.redeemMany(claims);
        vm.prank(PAYEE);
        channels.withdraw(address(0xD00D));
        vm.prank(address(0xCAFE));
        channels.withdraw(address(0xCAFE));
        _eq(token.balanceOf(address(0xD00D)), 600, "withdrawn elsewhere");
        _eq(token.balanceOf(address(0xCAFE)), 500, "the other payee");
        channels.requestClose(id);
        vm.warp(block.timestamp + WINDOW);
        channels.close(id);
        _eq(token.balanceOf(address(channels)), 500, "the second channel's rest");
    }

    /// A payer that the token refuses cannot close; its payee still gets everything it was signed.
    function test_blacklisted_payer_harms_only_itself() public {
        BlacklistToken token = new BlacklistToken();
        PaymentChannels channels = _channels(address(token));
        bytes32 id = channels.open(PAYEE, signer, 1000, FAR);
        channels.requestClose(id);
        vm.warp(block.timestamp + WINDOW);
        token.refuse(address(this));
        vm.expectRevert(abi.encodeWithSelector(BlacklistToken.Refused.selector, address(this)));
        channels.close(id);
        channels.redeem(id, 1000, _voucher(channels, id, 1000));
        _eq(token.balanceOf(PAYEE), 1000, "payee");
    }

    function test_rebasing_token_pays_what_is_booked_or_reverts_and_keeps_the_claim() public {
        RebasingToken token = new RebasingToken();
        PaymentChannels channels = _channels(address(token));
        bytes32 id = channels.open(PAYEE, signer, 1000, FAR);
        bytes32 second = channels.open(PAYEE, signer, 1000, FAR);
        token.rebase(50); // 1000 are left of 2000
        channels.redeem(id, 1000, _voucher(channels, id, 1000));
        bytes memory voucher = _voucher(channels, second, 1000);
        vm.expectRevert(
            abi.encodeWithSelector(IERC20Errors.ERC20InsufficientBalance.selector, address(channels), 0, 2000)
        );
        channels.redeem(second, 1000, voucher);
        _eq(channels.channel(second).claimed, 0, "claimed although unpaid");
        token.rebase(200); // a growing balance raises nobody's claim
        token.transfer(address(channels), 5000);
        channels.redeem(second, 1000, voucher);
        _eq(token.balanceOf(PAYEE), 4000 + 1000, "1000 at 50 % are 4000 at 200 %, and exactly 1000 more");
    }
}

/// The same for StakeRegistry.
contract RegistryHostileTokenTest is Base {
    address private constant DISPUTES = address(0xD15);
    address private constant VICTIM = address(0xBEEF);
    uint40 private constant DELAY = 1 days;

    function setUp() public {
        vm.warp(1_000_000);
    }

    /// This contract is the operator and the owner of the node.
    function _registry(address token) private returns (StakeRegistry registry) {
        registry = new StakeRegistry(IERC20(token), DISPUTES, DELAY, address(0), 0, 0);
        registry.register(1, "12D3KooW", bytes32(uint256(1)), "");
        (bool ok,) = token.call(abi.encodeCall(IERC20.approve, (address(registry), type(uint256).max)));
        _true(ok, "approved");
    }

    function _unbonded(StakeRegistry registry, uint96 amount) private {
        registry.beginUnbond(address(this), amount);
        vm.warp(block.timestamp + DELAY);
    }

    function _lock(StakeRegistry registry, uint96 amount) private {
        vm.prank(DISPUTES);
        registry.lock(address(this), amount);
    }

    function test_fee_on_transfer_token_cannot_come_in() public {
        StakeRegistry registry = _registry(address(new FeeToken()));
        vm.expectRevert(abi.encodeWithSelector(EntryGate.UnexpectedDeposit.selector, 1000, 990));
        registry.stake(address(this), 1000);
    }

    function test_lying_token_cannot_come_in() public {
        StakeRegistry registry = _registry(address(new LyingToken()));
        vm.expectRevert(abi.encodeWithSelector(EntryGate.UnexpectedDeposit.selector, 1000, 0));
        registry.stake(address(this), 1000);
    }

    function test_false_returning_token_reverts_and_the_stake_is_kept() public {
        FalseToken token = new FalseToken();
        StakeRegistry registry = _registry(address(token));
        registry.stake(address(this), 1000);
        _unbonded(registry, 400);
        _lock(registry, 100);
        token.arm(true);
        bytes memory failed = abi.encodeWithSelector(SafeERC20.SafeERC20FailedOperation.selector, address(token));
        vm.expectRevert(failed);
        registry.stake(address(this), 1);
        vm.expectRevert(failed);
        registry.withdraw(address(this));
        vm.expectRevert(failed);
        vm.prank(DISPUTES);
        registry.slash(address(this), 100, VICTIM);
        StakeRegistry.Node memory node = registry.node(address(this));
        _eq(uint256(node.stake) + node.unbonding, 1000, "kept");
        _eq(node.locked, 100, "still locked");
    }

    function test_token_that_returns_nothing_works() public {
        NoReturnToken token = new NoReturnToken();
        StakeRegistry registry = _registry(address(token));
        registry.stake(address(this), 1000);
        _lock(registry, 300);
        vm.prank(DISPUTES);
        registry.slash(address(this), 300, VICTIM);
        _unbonded(registry, 700);
        registry.withdraw(address(this));
        _eq(token.balanceOf(VICTIM), 300, "slashed");
        _eq(token.balanceOf(address(registry)), 0, "left behind");
    }

    function test_reentrant_token_cannot_reenter_any_function_that_moves_tokens() public {
        ReentrantToken token = new ReentrantToken();
        StakeRegistry registry = new StakeRegistry(IERC20(address(token)), address(token), DELAY, address(0), 0, 0);
        token.approve(address(registry), type(uint256).max);
        registry.register(1, "12D3KooW", bytes32(uint256(1)), "");
        bytes[3] memory calls = [
            abi.encodeCall(registry.stake, (address(this), 1)),
            abi.encodeCall(registry.withdraw, (address(this))),
            abi.encodeCall(registry.slash, (address(this), 1, VICTIM)) // the token itself plays Disputes
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            token.arm(address(registry), calls[i]);
            registry.stake(address(this), 1000);
            _true(!token.succeeded(), "reentered");
            bytes4 reason = bytes4(token.answer());
            _true(reason == ReentrancyGuardTransient.ReentrancyGuardReentrantCall.selector, "not the guard");
        }
        _eq(registry.node(address(this)).stake, 3000, "stake");
    }

    /// `lock` and `unlock` move no tokens and take no guard: a lock that is taken inside a withdrawal finds what is paid gone already.
    function test_reentrant_token_cannot_lock_what_is_being_paid_out() public {
        ReentrantToken token = new ReentrantToken();
        StakeRegistry registry = new StakeRegistry(IERC20(address(token)), address(token), DELAY, address(0), 0, 0);
        token.approve(address(registry), type(uint256).max);
        registry.register(1, "12D3KooW", bytes32(uint256(1)), "");
        registry.stake(address(this), 1000);
        _unbonded(registry, 600);
        token.arm(address(registry), abi.encodeCall(registry.lock, (address(this), 401)));
        registry.withdraw(address(this));
        _true(!token.succeeded(), "locked what had left");
        StakeRegistry.Node memory node = registry.node(address(this));
        _eq(node.locked, 0, "locked");
        _eq(token.balanceOf(address(registry)), 400, "left");
    }

    /// An owner that the token refuses keeps its stake waiting; everyone else's leaves, and a slash still takes it.
    function test_blacklisted_owner_harms_only_itself() public {
        BlacklistToken token = new BlacklistToken();
        StakeRegistry registry = _registry(address(token));
        registry.stake(address(this), 1000);
        address other = address(0xCAFE);
        token.transfer(other, 500);
        vm.startPrank(other);
        registry.register(1, "12D3KooX", bytes32(uint256(2)), "");
        token.approve(address(registry), 500);
        registry.stake(other, 500);
        registry.beginUnbond(other, 500);
        vm.stopPrank();
        _unbonded(registry, 1000);
        token.refuse(address(this));
        vm.expectRevert(abi.encodeWithSelector(BlacklistToken.Refused.selector, address(this)));
        registry.withdraw(address(this));
        vm.prank(other);
        registry.withdraw(other);
        _lock(registry, 1000);
        vm.prank(DISPUTES);
        registry.slash(address(this), 1000, VICTIM);
        _eq(token.balanceOf(other), 500, "the other owner");
        _eq(token.balanceOf(VICTIM), 1000, "slashed");
    }

    function test_rebasing_token_pays_what_is_booked_or_reverts_and_keeps_the_stake() public {
        RebasingToken token = new RebasingToken();
        StakeRegistry registry = _registry(address(token));
        registry.stake(address(this), 1000);
        _unbonded(registry, 1000);
        token.rebase(50);
        vm.expectRevert(
            abi.encodeWithSelector(IERC20Errors.ERC20InsufficientBalance.selector, address(registry), 1000, 2000)
        );
        registry.withdraw(address(this));
        _eq(registry.node(address(this)).unbonding, 1000, "kept");
        token.rebase(200);
        registry.withdraw(address(this));
        _eq(token.balanceOf(address(registry)), 1000, "the surplus is nobody's");
    }
}
